"""Every method by name. A method is a function from its options to a `Pipeline`; its docstring is its description."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.methods.a2po import a2po
from orchestrator.methods.dpo import dpo
from orchestrator.methods.generate_data import generate_data
from orchestrator.methods.gfpo import gfpo
from orchestrator.methods.gkd import gkd
from orchestrator.methods.gold import gold
from orchestrator.methods.grpo import grpo
from orchestrator.methods.nash_md import nash_md
from orchestrator.methods.on_policy_distillation import iw_opd, minillm, on_policy_distillation
from orchestrator.methods.online_dpo import online_dpo
from orchestrator.methods.ppo import ppo
from orchestrator.methods.process_reward_model import process_reward_model
from orchestrator.methods.reference_free import alphapo, cpo, orpo, simpo, tpo
from orchestrator.methods.reinforce import reinforce_pp, reinforce_pp_baseline, rloo
from orchestrator.methods.reward_model import reward_model
from orchestrator.methods.self_distillation import sdft, sdpo
from orchestrator.methods.sft import sft
from orchestrator.methods.sppo import sppo
from orchestrator.methods.unpaired import bco, kto
from orchestrator.methods.xpo import xpo
from orchestrator.pipeline import Pipeline

METHODS: dict[str, Callable[..., Pipeline]] = {
    "sft": sft,
    "dpo": dpo,
    "cpo": cpo,
    "simpo": simpo,
    "alphapo": alphapo,
    "orpo": orpo,
    "tpo": tpo,
    "kto": kto,
    "bco": bco,
    "reward_model": reward_model,
    "process_reward_model": process_reward_model,
    "grpo": grpo,
    "gfpo": gfpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "a2po": a2po,
    "ppo": ppo,
    "online_dpo": online_dpo,
    "nash_md": nash_md,
    "xpo": xpo,
    "sppo": sppo,
    "gkd": gkd,
    "on_policy_distillation": on_policy_distillation,
    "iw_opd": iw_opd,
    "minillm": minillm,
    "gold": gold,
    "sdft": sdft,
    "sdpo": sdpo,
    "generate_data": generate_data,
}
