"""The task: training, generation, grounding, metrics, evaluation."""
