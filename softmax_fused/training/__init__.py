"""The lab: linear regression, softmax regression and an MLP, with the fused loss or with the losses it replaces.

From the bottom up: `errors`, `wording`, `versions`, `files` and `signals` serve all; `ranks` are the processes that
train together; `data` reads and batches; `models` holds models, losses and the training loop; `config` holds the
settings of a run; `report` shows results; `runs` trains and keeps them. `predict`, `info` and `commands` use all of
these.
"""
