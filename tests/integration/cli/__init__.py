"""The command line, end to end: options, output on terminals, wrong recipes, signals."""
