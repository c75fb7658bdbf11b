"""What is measured and how, one folder per system: definitions, a model on data, and the command."""
