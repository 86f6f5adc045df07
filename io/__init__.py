"""File formats and I/O: safetensors, the Hugging Face Hub, output directories, system calls. Not about merging."""
