"""The peer's configuration of a case of `losses.json`, as ours: (method, options).

Complete by construction: a key of the peer's that no table here names is an error, and so is a value of it that ours
cannot express. Keys that only say how the peer slices a batch are named as such, and used where numbers are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Options = dict[str, Any]

NOT_BUILT = {  # families of cases: what they belong to
    "papo": "papo, which sees images",
}
ELSEWHERE = {  # case: the test that holds the same number, or the same fact
    "data/chatml": "tests/unit/test_source_formats.py",
    "data/extract_prompt_conv": "tests/unit/test_source_preferences.py",
    "data/extract_prompt_text": "tests/unit/test_source_preferences.py",
    "data/pack_bfd": "tests/unit/test_source_packing.py",
    "data/pack_bfd_split": "tests/unit/test_source_packing.py",
    "reward_fn/cosine": "tests/unit/test_reward_functions.py",
    "reward_fn/repetition": "tests/unit/test_reward_functions.py",
    "reward_fn/soft_overlong": "tests/unit/test_reward_functions.py",
}
NOT_COMPARABLE = {
    "data/collator_padding_free": "the layout of the peer's batches; ours are ragged and have no padding to free",
    "data/repeat_sampler": "the order of the peer's sampler; ours draws prompts, and an engine repeats them",
    "dpo/real_tiny_sigmoid": "needs the weights of a model that is not in the file",
    "minillm/full": "needs the weights of models that are not in the file",
    "sft/real_tiny_nll": "needs the weights of a model that is not in the file",
}

LOSSES_OF_DPO_WITH_SMOOTHING = frozenset({"exo_pair", "robust", "aot", "aot_unpaired"})  # in the peer
GRPO_NAMES = {
    "eps": "epsilon",
    "epsh": "epsilon_high",
    "delta": "delta",
    "beta": "beta",
    "opm": "off_policy_mask_threshold",
    "ecoef": "entropy_coef",
    "loss_type": "loss_type",
    "level": "importance_sampling_level",
}
UNCLIPPED = frozenset({"cispo", "sapo", "vespo", "dppo"})


class Inexpressible(ValueError):
    """The peer's configuration asks for something that ours has no word for."""


class Keys:
    """A configuration of the peer's whose every key must be taken."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.case = str(case["id"])
        self._left = dict(case["config"])

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def done(self) -> None:
        if self._left:
            raise Inexpressible(f"{self.case}: nothing here says what the peer's {sorted(self._left)} are in ours")


def ours(case: Mapping[str, Any]) -> tuple[str, Options]:
    """The method and the options that compute a case. Raises Inexpressible."""
    family, keys = str(case["id"]).partition("/")[0], Keys(case)
    if family not in MAPPINGS:
        raise Inexpressible(f"{case['id']}: nothing here says which method of ours the peer's {family} is")
    found = MAPPINGS[family](keys, case.get("inputs", {}))
    keys.done()
    return found


def _dpo(keys: Keys, _: Any) -> tuple[str, Options]:
    names = keys.take("loss_type")
    options: Options = {"loss_type": names, "loss_weights": keys.take("loss_weights")}
    scored = set(names) - {"sft"}
    smoothing, tau = keys.take("label_smoothing", 0.0), keys.take("discopop_tau", 0.05)
    divergence, alpha = keys.take("f_divergence_type", "reverse_kl"), keys.take("f_alpha_divergence_coef", 0.5)
    of_scores = {name: keys.take(name) for name in ("beta", "ld_alpha", "use_weighting")}
    if scored:
        options |= of_scores | {"f_divergence_type": divergence}
        options |= {"f_alpha_divergence_coef": alpha} if divergence == "alpha_divergence" else {}
    options |= {"label_smoothing": smoothing} if scored & LOSSES_OF_DPO_WITH_SMOOTHING else {}
    options |= {"discopop_tau": tau} if "discopop" in scored else {}
    return "dpo", options


def _sft(keys: Keys, _: Any) -> tuple[str, Options]:
    return "sft", {"loss_type": keys.take("loss_type")}


def _kto(keys: Keys, _: Any) -> tuple[str, Options]:
    return "kto", {name: keys.take(name) for name in ("loss_type", "beta", "desirable_weight", "undesirable_weight")}


def _bco(keys: Keys, _: Any) -> tuple[str, Options]:
    return "bco", {"beta": keys.take("beta")}


def _cpo(keys: Keys, inputs: Mapping[str, Any]) -> tuple[str, Options]:
    """The peer has one trainer for three methods of ours. Its function of scores alone has no likelihood term."""
    loss, alpha, gamma = keys.take("loss_type"), keys.take("alpha", 0), keys.take("simpo_gamma", 0)
    of_scores = "policy_chosen_logps" in inputs
    options: Options = {"beta": keys.take("beta"), "cpo_alpha": keys.take("cpo_alpha", 0.0 if of_scores else 1.0)}
    smoothing = keys.take("label_smoothing", 0)
    options |= {"label_smoothing": smoothing} if smoothing and loss not in ("hinge", "ipo") else {}
    if loss == "alphapo":  # the peer's word for simpo with these
        loss, options["cpo_alpha"] = "simpo", 0.0
    if alpha and loss == "sigmoid" and of_scores:  # of one score, sum and mean are the same
        loss, gamma = "simpo", 0
    if alpha and loss != "simpo":
        raise Inexpressible(f"{keys.case}: alpha={alpha} with loss_type={loss}; ours has it in alphapo alone")
    if loss == "simpo":
        return (
            ("alphapo", options | {"simpo_gamma": gamma, "alpha": alpha})
            if alpha
            else (
                "simpo",
                options | {"simpo_gamma": gamma},
            )
        )
    return "cpo", options | {"loss_type": loss}


def _online_dpo(keys: Keys, _: Any) -> tuple[str, Options]:
    """The peer hands every micro-batch's mean to the gradient undivided, so that its gradient grows with
    `gradient_accumulation_steps`. Ours is the mean over all pairs of the step: what the peer computes of a step that
    has one micro-batch."""
    keys.take("gradient_accumulation_steps")
    options = {name: keys.take(name) for name in ("beta", "loss_type", "missing_eos_penalty")}
    return "online_dpo", {**options, "ties": "keep"}


def _orpo(keys: Keys, _: Any) -> tuple[str, Options]:
    return "orpo", {"beta": keys.take("beta")}


def _tpo(keys: Keys, _: Any) -> tuple[str, Options]:
    loss, gamma = keys.take("loss_type", keys.case.removeprefix("tpo/")), keys.take("tpo_l_gamma")
    options = {"loss_type": loss, "beta": keys.take("beta"), "tpo_alpha": keys.take("tpo_alpha")}
    return "tpo", options | ({"tpo_l_gamma": gamma} if loss == "tpo-l" else {})


def _reward(keys: Keys, inputs: Mapping[str, Any]) -> tuple[str, Options]:
    """The peer takes margins if the data has them; ours if it is told to."""
    centering = keys.take("center_rewards_coefficient") or 0.0
    use_margin = inputs.get("margin") is not None
    return "reward_model", {"use_margin": use_margin, "center_rewards_coefficient": centering}


def _prm(keys: Keys, _: Any) -> tuple[str, Options]:
    return "process_reward_model", {name: keys.take(name) for name in ("step_separator", "train_on_last_step_only")}


def _grpo(keys: Keys, inputs: Mapping[str, Any]) -> tuple[str, Options]:
    """`ga` and `spg` slice the batch, and `isr` and `tool` only say that the inputs hold such a column."""
    for name in ("ga", "spg", "isr", "tool"):
        keys.take(name)
    options: Options = {name: keys.take(theirs) for theirs, name in GRPO_NAMES.items()}
    loss = options["loss_type"]
    bias, share = keys.take("bias", True), keys.take("tq", 1.0)
    options |= {"use_bias_correction_kl": bias} if options["beta"] else {}
    # The quantile of the entropies is one of them, and whether a token equals it is a matter of rounding: the peer's
    # float32 says that it does not reach it.
    options |= {"top_entropy_quantile": share - 1e-6} if share < 1 else {}
    options |= {"updates_per_batch": 2}  # the old log-probabilities are given
    if loss in UNCLIPPED:
        options.pop("epsilon")
    if loss in UNCLIPPED - {"cispo"}:
        options.pop("epsilon_high")
    if loss in UNCLIPPED | {"gmpo"} and options["delta"] is None:
        options.pop("delta")
    if loss == "dr_grpo":
        options["max_completion_length"] = inputs["max_completion_length"]
    ratio = inputs.get("importance_sampling_ratio")
    if (
        ratio is not None and loss != "vespo"
    ):  # which takes its ratio to the sampler; the given ones are clamped already
        options["correction"] = "token_truncate" if len(ratio[0]) > 1 else "sequence_truncate"
        options["correction_max"] = 1e6
    return "grpo", options


def _gmpo(keys: Keys, _: Any) -> tuple[str, Options]:
    options: Options = {"loss_type": "gmpo", "updates_per_batch": 2}
    options |= {name: keys.take(name) for name in ("epsilon", "beta")}
    return "grpo", options | ({"use_bias_correction_kl": False} if options["beta"] else {})


def _gspo_token(keys: Keys, _: Any) -> tuple[str, Options]:
    loss = keys.case.removeprefix("gspo_token/")
    fixed = {"loss_type": loss, "importance_sampling_level": "sequence_token", "updates_per_batch": 2}
    return "grpo", {**fixed, "epsilon": keys.take("epsilon")}


def _rloo(keys: Keys, _: Any) -> tuple[str, Options]:
    """The old log-probabilities are given, as of a second update."""
    return "rloo", {"epsilon": keys.take("epsilon"), "updates_per_batch": 2}


def _rloo_adv(keys: Keys, _: Any) -> tuple[str, Options]:
    return "rloo", {name: keys.take(name) for name in ("beta", "normalize_advantages", "reward_clip_range")}


def _a2po(keys: Keys, _: Any) -> tuple[str, Options]:
    return "a2po", {"beta2": keys.take("beta2")}


def _xpo(keys: Keys, _: Any) -> tuple[str, Options]:
    options = {name: keys.take(name) for name in ("beta", "alpha")}
    return "xpo", {**options, "loss_type": keys.case.removeprefix("xpo/")}


def _nash_md(keys: Keys, _: Any) -> tuple[str, Options]:
    return "nash_md", {"beta": keys.take("beta")}


def _gkd(keys: Keys, _: Any) -> tuple[str, Options]:
    """`reduction` and `num_items_in_batch` say what the sum over tokens is divided by."""
    for name in ("reduction", "num_items_in_batch"):
        keys.take(name)
    return "gkd", {"beta": keys.take("beta"), "temperature": keys.take("temperature")}


def _distillation(keys: Keys, _: Any) -> tuple[str, Options]:
    """The temperature of ours is that of sampling, which is no option of the method."""
    keys.take("temperature")
    return "on_policy_distillation", {"beta": keys.take("beta")}


def _iw_opd(keys: Keys, _: Any) -> tuple[str, Options]:
    return "iw_opd", {"gamma": keys.take("gamma")}


def _gold(keys: Keys, _: Any) -> tuple[str, Options]:
    """The teacher's vocabulary of 12 entries, all over the wire."""
    return "gold", {"teacher_top_k": 12}


def _sdft(keys: Keys, _: Any) -> tuple[str, Options]:
    """Whole distributions are those of all tokens; the case of the sampled token has none."""
    k, alpha = keys.take("k", 9), keys.take("alpha", None)
    keys.take("add_tail", None)
    options = {"importance_clip": None, "teacher_template": "{prompt}"}
    return "sdft", {**options, "teacher_top_k": None} if alpha is None else {
        **options,
        "teacher_top_k": k,
        "beta": alpha,
    }


def _minillm(keys: Keys, _: Any) -> tuple[str, Options]:
    """With a gamma of 0 there is nothing to normalise."""
    gamma, normalized = keys.take("gamma", 0.0), keys.take("length_normalization", True)
    return "minillm", {"gamma": gamma, **({"length_normalization": normalized} if gamma else {})}


def _dppo(keys: Keys, _: Any) -> tuple[str, Options]:
    distance = keys.case.removeprefix("dppo/mask_")
    return "grpo", {"loss_type": "dppo", "dppo_distance": distance, "dppo_threshold": keys.take("delta")}


def _ppo(keys: Keys, _: Any) -> tuple[str, Options]:
    """Log-probabilities are given at the temperature that the peer names, and scores with its penalty."""
    keys.take("temperature")
    penalty = keys.take("missing_eos_penalty") or 0.0
    names = ("kl_estimator", "kl_coef", "gamma", "lam", "whiten_rewards")
    return "ppo", {"missing_eos_penalty": penalty, **{name: keys.take(name) for name in names}}


MAPPINGS = {
    "a2po": _a2po,
    "bco": _bco,
    "cpo": _cpo,
    "distillation": _distillation,
    "dpo": _dpo,
    "dppo": _dppo,
    "gkd": _gkd,
    "gmpo": _gmpo,
    "gold": _gold,
    "grpo": _grpo,
    "gspo_token": _gspo_token,
    "iw_opd": _iw_opd,
    "kto": _kto,
    "minillm": _minillm,
    "nash_md": _nash_md,
    "online_dpo": _online_dpo,
    "orpo": _orpo,
    "ppo": _ppo,
    "prm": _prm,
    "reward": _reward,
    "rloo": _rloo,
    "rloo_adv": _rloo_adv,
    "sdft": _sdft,
    "sft": _sft,
    "tpo": _tpo,
    "xpo": _xpo,
}
