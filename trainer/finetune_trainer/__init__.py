"""Prepares rows, trains, exports and reports: what the pods of a job run, and `finetune run` on one machine."""

import logging

# Says at import of torch, in every process, that triton is missing: without a GPU nobody needs it.
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
