"""The rules between a FinetuneRuntime's fields. The one list: see `rules.Rule`."""

from __future__ import annotations

from typing import Final

from finetune_api.rules import Rule

RUNTIME_RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "spec.tolerations[]",
        ("value", "operator"),
        "!has(self.value) || self.operator == 'Equal'",
        "a toleration with operator Exists has no value",
        "remove value, or set operator to Equal",
        lambda toleration: "value" not in toleration or toleration["operator"] == "Equal",
    ),
    Rule(
        "spec.tolerations[]",
        ("key", "operator"),
        "has(self.key) || self.operator == 'Exists'",
        "a toleration with operator Equal needs a key",
        "set key, or operator to Exists",
        lambda toleration: "key" in toleration or toleration["operator"] == "Exists",
    ),
    Rule(
        "spec.tolerations[]",
        ("tolerationSeconds", "effect"),
        "!has(self.tolerationSeconds) || has(self.effect) && self.effect == 'NoExecute'",
        "tolerationSeconds only means something with effect NoExecute",
        "set effect to NoExecute, or remove tolerationSeconds",
        lambda toleration: "tolerationSeconds" not in toleration or toleration.get("effect") == "NoExecute",
    ),
    Rule(
        "spec.namespaces.matchExpressions[]",
        ("values", "operator"),
        "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
        "In and NotIn need values; Exists and DoesNotExist have none",
        "add or remove values",
        lambda expression: (expression["operator"] in ("In", "NotIn")) == bool(expression.get("values")),
    ),
    Rule(
        "spec",
        ("limits.maxCost", "accelerator.pricePerHour"),
        "!has(self.limits.maxCost) || has(self.accelerator.pricePerHour)",
        "maxCost cannot be held without a price",
        "set accelerator.pricePerHour",
        lambda spec: "maxCost" not in spec["limits"] or "pricePerHour" in spec["accelerator"],
    ),
)
