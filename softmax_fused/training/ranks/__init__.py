"""The processes that train one model together: who they are, what each computes on, and its part of a batch."""
