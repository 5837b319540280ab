"""Pictures from prompts: the pipeline, the command line, and the benchmark."""
