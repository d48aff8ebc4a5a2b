"""Planning: what a job will need in memory, time and money, before anything is spent."""

from finetune_trainer.planning.plan import PLAN_FILE, JobPlan, plan, planned_stage

__all__ = ["PLAN_FILE", "JobPlan", "plan", "planned_stage"]
