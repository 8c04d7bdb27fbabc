"""The lab: linear regression, softmax regression and an MLP, with the fused loss or with the losses it replaces.

From the bottom up: `errors`, `wording`, `files` and `signals` are used everywhere; `ranks` are the processes that train
together; `data` reads and batches; `models` holds models, losses and the training loop; `config` the settings of a run;
`report` everything that is shown; `runs` trains and keeps the results. On these stand `predict`, `info` and `commands`.
"""
