"""Fine-tuning on all of GLUE: a table of tasks and a queue of jobs."""
