"""`kubectl finetune`: what a person sees of FinetuneJobs, and the few things they do to them."""
