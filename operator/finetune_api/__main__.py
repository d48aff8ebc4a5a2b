"""`python -m finetune_api` is `finetune`."""

from finetune_api.cli import main

main()
