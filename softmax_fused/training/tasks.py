"""What a data set asks of a model; models and losses say which of these they are for."""

from enum import Enum


class Task(Enum):
    """Three kinds of target, by what a model returns for a batch of N."""

    CLASSES = "several classes"  # logits (N, C); class indices, or probabilities (N, C)
    BINARY = "two classes"  # one logit each, (N,), that of the second class; class indices 0 and 1
    REGRESSION = "a regression"  # values (N,)
