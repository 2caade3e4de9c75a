"""Where reward comes from: prompts with ground truth, splits, and the score of a completion."""

from klab.tasks.task import Example, Score, SplitName, Task, load_task

__all__ = ["Example", "Score", "SplitName", "Task", "load_task"]
