"""What will go wrong before it does: findings before the first step, and after it. Changes nothing.

`before` reads the model, the resolution and the optimizer. `watch` goes around the first forward and backward pass and
sees why a trainable got no gradient; `after_first_step` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn

from thawline.core.index import NORM_STATISTICS
from thawline.freeze.activations import SavedActivations as SavedActivations
from thawline.freeze.apply import is_pinned
from thawline.freeze.audit import audit_average
from thawline.freeze.finding import Finding as Finding
from thawline.freeze.inspect import parameters_by_name, unwrap
from thawline.freeze.resolve import Resolution
from thawline.freeze.watch import Watch as Watch

_RECOMPILE_LIMIT = 8  # torch._dynamo.config.recompile_limit at its default


def before(
    model: nn.Module,
    resolution: Resolution,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    average: nn.Module | None = None,
) -> list[Finding]:
    """Findings before the first step of a phase. average: a running average (EMA) of the model, if there is one."""
    model = unwrap(model)
    findings = _requires_grad(model, resolution)
    if optimizer is not None:
        findings += _optimizer(model, resolution, optimizer)
    findings += _norms(model, resolution)
    findings += _modes(model, resolution)
    if average is not None:
        drifted = audit_average(model, average, resolution)
        if drifted:
            findings.append(
                Finding(
                    code="average-drifts",
                    severity="error",
                    what="the running average of frozen tensors is not the tensor itself",
                    names=drifted,
                    fix="average with lerp (torch's AveragedModel), or leave frozen tensors out",
                )
            )
        elif not isinstance(average, torch.optim.swa_utils.AveragedModel):
            findings.append(
                Finding(
                    code="average-over-frozen",
                    severity="warning",
                    what="a running average covers frozen tensors; d*a + (1-d)*a rounds, so they will drift in it",
                    fix="average with lerp (torch's AveragedModel), or only what trains",
                )
            )
    if resolution.phases > _RECOMPILE_LIMIT and "torch._dynamo" in sys.modules:
        findings.append(
            Finding(
                code="recompiles",
                severity="warning",
                what=f"{resolution.phases} phases, each with a graph of its own, pass torch.compile's limit of "
                f"{_RECOMPILE_LIMIT}; it would go on uncompiled",
                fix="thaw more layers at a time, or let Frozen.advance reset the graphs (it does)",
            )
        )
    return findings


def watch(model: nn.Module, resolution: Resolution) -> Watch:
    """Goes around one forward and backward pass: `with watch(model, resolution) as seen: loss().backward()`."""
    return Watch(unwrap(model), resolution)


def after_first_step(
    model: nn.Module,
    resolution: Resolution,
    seen: Watch | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Finding]:
    """Findings after the first backward pass, while its gradients are still there.

    Each trainable without gradient is named with the reason, as far as `seen` can tell.
    """
    model = unwrap(model)
    params = parameters_by_name(model)
    missing = [n for n in resolution.trainable_names if params[n].grad is None]
    findings = [_no_gradient(code, names) for code, names in _reasons(missing, seen).items()]
    if missing and len(missing) == len(resolution.trainable_names):
        findings.append(
            Finding(
                code="no-gradient-at-all",
                severity="error",
                what="nothing that trains got a gradient; an optimizer step, and GradScaler.step, would fail or idle",
                fix="see the reasons above",
            )
        )
    unused = [n for n in missing if seen is not None and seen.reason(n) == "unused"]
    if unused:
        findings.append(
            Finding(
                code="find-unused-parameters",
                severity="warning",
                what="under DistributedDataParallel these need find_unused_parameters=True, or the reducer waits",
                names=tuple(unused),
                fix="freeze them in the plan if they are never used",
            )
        )
    findings += _gradients(params, resolution, optimizer)
    stale = [d.name for d in resolution.decisions if not d.is_buffer and not d.trains]
    left = [n for n in stale if params[n].grad is not None]
    if left:
        findings.append(
            Finding(
                code="frozen-with-gradient",
                severity="error",
                what="frozen parameters hold a gradient; it inflates the norm that clipping sees",
                names=tuple(left),
                fix="apply the plan again (it clears them), and clip over frozen.trainable_parameters()",
            )
        )
    if seen is not None:
        findings += seen.findings()
    return findings


def _requires_grad(model: nn.Module, resolution: Resolution) -> list[Finding]:
    params = parameters_by_name(model)
    open_but_frozen = [n for n, p in params.items() if p.requires_grad and not resolution[n].trains]
    closed = [n for n in resolution.trainable_names if not params[n].requires_grad]
    findings = []
    if open_but_frozen or closed:
        findings.append(
            Finding(
                code="requires-grad",
                severity="error",
                what="requires_grad is not what the plan says",
                names=(*open_but_frozen, *closed),
                fix="something changed it after the plan was applied; apply it last",
            )
        )
    return findings


def _optimizer(model: nn.Module, resolution: Resolution, optimizer: torch.optim.Optimizer) -> list[Finding]:
    names = {id(p): n for n, p in parameters_by_name(model).items()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    inside = {names[id(p)] for p in held if id(p) in names}
    ghosts = tuple(f"a tensor of shape {tuple(p.shape)}" for p in held if id(p) not in names)
    planned = set(resolution.trainable_names)
    cases = [
        (
            "not-in-optimizer",
            "these train but are not in the optimizer: they never move, and their gradient piles up",
            tuple(n for n in resolution.trainable_names if n not in inside),
            "build the optimizer from frozen.param_groups(...), and attach it so that it follows the phases",
        ),
        (
            "not-in-plan",
            "these are frozen but in the optimizer: weight decay or old moments can move them",
            tuple(n for n in names.values() if n in inside - planned),
            "build the optimizer from frozen.param_groups(...)",
        ),
        (
            "not-in-model",
            "the optimizer holds tensors that the model no longer has",
            ghosts,
            "a part was replaced after the optimizer was built; build it again",
        ),
    ]
    findings = [
        Finding(code=code, severity="error", what=what, names=found, fix=fix)
        for code, what, found, fix in cases
        if found
    ]
    zero = [g for g in optimizer.param_groups if g["params"] and g["lr"] == 0 and "initial_lr" not in g]
    if zero:
        findings.append(
            Finding(
                code="lr-zero",
                severity="error",
                what="a group with a rate of 0 is no freeze: statistics move, the backward pass is paid in full, and a "
                "scheduler may set the rate",
                names=tuple(names.get(id(p), "?") for g in zero for p in g["params"]),
                fix="freeze in the plan",
            )
        )
    return findings


def _norms(model: nn.Module, resolution: Resolution) -> list[Finding]:
    drifting, adapting, unlearned = [], [], []
    for path, module in model.named_modules():
        names = [f"{path}.{k}" if path else k for k in module._buffers if k in NORM_STATISTICS]
        names = [n for n in names if n in resolution]
        if not names:
            continue
        if all(not resolution[n].trains for n in names):
            if module.training and model.training:
                drifting.append(path)
        elif resolution.norms.get(path) == "tracking":
            adapting.append(path)
        frozen_stats = all(not resolution[n].trains for n in names)
        counter = module._buffers.get("num_batches_tracked")
        if frozen_stats and counter is not None and not counter.is_meta and int(counter) == 0:
            mean = module._buffers.get("running_mean")
            if mean is not None and not bool(mean.any()):
                unlearned.append(path)
    findings = []
    if drifting:
        findings.append(
            Finding(
                code="norm-drifts",
                severity="error",
                what="frozen normalisation layers are in train mode: their statistics will move",
                names=tuple(drifting),
                fix="apply the plan (norms: pinned), or say norms: tracking if that is meant",
            )
        )
    if adapting:
        findings.append(
            Finding(
                code="norm-tracks",
                severity="info",
                what="statistics adapt to the new data, as norms: tracking says; the frozen part's output changes",
                names=tuple(adapting),
            )
        )
    if unlearned:
        findings.append(
            Finding(
                code="norm-unlearned",
                severity="warning",
                what="these are pinned, but their statistics were never learned (mean 0, no batch counted)",
                names=tuple(unlearned),
                fix="use norms: tracking, or load the base's buffers too",
            )
        )
    return findings


def _modes(model: nn.Module, resolution: Resolution) -> list[Finding]:
    pinned = set(resolution.pinned)
    loose, patched, recurrent = [], [], []
    for path, module in model.named_modules():
        if "train" in module.__dict__:
            patched.append(path)
        if path in pinned and not is_pinned(module):
            loose.append(path)
        if path in pinned and isinstance(module, nn.RNNBase) and _feeds_from_trainable(path, resolution):
            recurrent.append(path)
    findings = []
    if loose:
        findings.append(
            Finding(
                code="not-pinned",
                severity="warning",
                what="frozen modules follow train(): dropout in them stays on (shared with a part that trains?)",
                names=tuple(loose),
                fix="apply the plan; give each part its own dropout module",
            )
        )
    if patched:
        findings.append(
            Finding(
                code="train-patched",
                severity="warning",
                what="train() was replaced on the instance; eval() may return something else than the module",
                names=tuple(patched),
                fix="delete the attribute; the plan holds frozen modules in eval mode by itself",
            )
        )
    if recurrent:
        findings.append(
            Finding(
                code="cudnn-rnn",
                severity="warning",
                what="on a GPU, cuDNN cannot pass a gradient through a recurrent layer in eval mode",
                names=tuple(recurrent),
                fix="train it too, or run it under torch.backends.cudnn.flags(enabled=False)",
            )
        )
    return findings


def _feeds_from_trainable(path: str, resolution: Resolution) -> bool:
    """Whether something that trains stands before the module, so that a gradient has to pass through it."""
    for name in (d.name for d in resolution.decisions if not d.is_buffer):
        if name.startswith(f"{path}."):
            return False
        if resolution[name].trains:
            return True
    return False


def _reasons(missing: Sequence[str], seen: Watch | None) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name in missing:
        reasons.setdefault(seen.reason(name) if seen is not None else "unknown", []).append(name)
    return reasons


_WHY = {
    "unused": ("their module was not called in this step", "freeze them, or use them in the loss"),
    "checkpoint": (
        (
            "a reentrant checkpoint whose inputs need no gradient cuts them off "
            '(the warning "None of the inputs have requires_grad=True" is fatal here)'
        ),
        "checkpoint(..., use_reentrant=False)",
    ),
    "no_grad": ("their module ran under torch.no_grad()", "take the no_grad away from around what trains"),
    "inference": ("their module ran under torch.inference_mode()", "take it away from around what trains"),
    "detached": ("what they computed did not reach the loss (detached, or not used)", "look for detach() or .data"),
    "bypassed": ("their module passed a gradient on without using them", "freeze them, or use them in the loss"),
    "unknown": ("no reason can be told without watching the pass", "use doctor.watch around the first step"),
}


def _no_gradient(code: str, names: Sequence[str]) -> Finding:
    what, fix = _WHY[code]
    return Finding(
        code=f"no-gradient-{code}",
        severity="error",
        what=f"these train but got no gradient: {what}",
        names=tuple(names),
        fix=fix,
    )


def _gradients(
    params: dict[str, nn.Parameter], resolution: Resolution, optimizer: torch.optim.Optimizer | None
) -> list[Finding]:
    decay: dict[int, float] = {}
    for group in optimizer.param_groups if optimizer is not None else ():
        decay.update((id(p), group.get("weight_decay", 0)) for p in group["params"])
    zero, bad = [], []
    for name in resolution.trainable_names:
        grad = params[name].grad
        if grad is None:
            continue
        if not bool(torch.isfinite(grad).all()):
            bad.append(name)
        # lora_A has none while lora_B is still zero, by construction.
        elif not bool(grad.any()) and ".lora_A." not in name and decay.get(id(params[name]), 0):
            zero.append(name)
    findings = []
    if zero:
        findings.append(
            Finding(
                code="decay-only",
                severity="warning",
                what="their gradient is zero everywhere, so weight decay alone moves them",
                names=tuple(zero),
                fix="freeze them, or add them to no_decay",
            )
        )
    if bad:
        findings.append(
            Finding(
                code="not-finite",
                severity="error",
                what="their gradient is not finite",
                names=tuple(bad),
                fix="lower the rate, or use fp32",
            )
        )
    return findings
