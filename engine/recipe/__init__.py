"""The user's configuration: parsed, validated, typed."""
