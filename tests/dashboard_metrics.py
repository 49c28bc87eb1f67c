"""Metrics of the Grafana dashboard that a plain run of methods that sample does not have: where they are written."""

IN_OTHER_RUNS = {
    "eval_reward": ("orchestrator/collection/evaluation.py", "eval_"),
    "*rewards/accuracies": ("orchestrator/losses/pairwise.py", "rewards/accuracies"),
    "accuracy": ("orchestrator/losses/preference_models.py", '"accuracy"'),
    "eval_accuracy": ("orchestrator/losses/preference_models.py", '"accuracy"'),
    "*first_error": ("orchestrator/losses/step_labels.py", '"first_error"'),
    "rewards/*/failed/*": ("orchestrator/reporting/rollout_metrics.py", 'rewards/{name}/failed/{kind}"'),
    "step": ("orchestrator/reporting/metrics.py", '{"step": float(step)'),
}
