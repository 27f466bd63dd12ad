"""The command line `littlebit`: its options, and what each command runs."""
