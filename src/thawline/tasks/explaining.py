"""What the program's words mean, at more length than a message has room for: exit codes, errors, findings, grades.

Plain text, no torch: `thawline explain WORD` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from thawline.core.config import near_names
from thawline.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Page:
    """title: the word, as messages and logs spell it; meaning: what happened and why it matters; do: what helps."""

    title: str
    meaning: str
    do: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {"word": self.title, "meaning": self.meaning, "do": list(self.do)}

    def text(self) -> str:
        return "\n".join((self.title, f"  {self.meaning}", *(f"  - {line}" for line in self.do)))


_RECIPE_HELP = (
    "the message names file:line:column and the nearest known word",
    "`thawline plan RECIPE` shows what a recipe means without training",
    "`thawline init MODEL` writes a recipe with a comment on every key that people change",
)
_BASE_HELP = (
    "give the base that the message names with --base; a delta alone is not a model",
    "`thawline diff A B` shows which tensors two models differ in",
)

PAGES: tuple[Page, ...] = (
    Page("RecipeError", "A recipe, an override, a plan or a command line cannot be meant as written.", _RECIPE_HELP),
    Page(
        "SelectorError",
        "A selector of the plan matches nothing, contradicts another, or splits a tied weight. It stops the run at "
        "once, because a rule that freezes nothing would be found only when training is over.",
        ("take one of the near misses that the message lists", "`thawline plan RECIPE` lists the blocks by name"),
    ),
    Page(
        "MissingExtra",
        "An optional package is absent, or is there and does not import (a torchvision built for CUDA beside a torch "
        "for the CPU is the usual case).",
        ("run the install command in the message", "`thawline env` shows what works here and what does not"),
    ),
    Page(
        "DataError",
        "Samples are missing, empty, or unreadable beyond `data.max_bad`. A single bad sample costs one sample: it is "
        "skipped, counted, and listed in events.jsonl.",
        ("`thawline data check LIST` lists every file that cannot be read, and why",),
    ),
    Page(
        "CheckpointError",
        "A checkpoint is torn, altered or foreign, or its tensors do not account for the whole model. Nothing of it "
        "was loaded.",
        (
            "`thawline verify PATH` says what is wrong with which file",
            "a run goes back to its newest whole checkpoint by itself: `thawline resume RUN`",
        ),
    ),
    Page(
        "BaseMismatch",
        "A delta holds only what a run changed. It belongs to the base it was trained from, known by a fingerprint of "
        "every tensor; laid over another one it would talk gibberish, so it is refused.",
        _BASE_HELP,
    ),
    Page(
        "LawBroken",
        "Something changed that the plan does not name, something that should train got no gradient, or a repeated "
        "step came out with other bits. The checkpoints before it are whole.",
        (
            "audit.json in the run directory names the tensors",
            "look at what the run's code does besides the loop: custom modules that write into their own tensors",
        ),
    ),
    Page(
        "Stopped",
        "The run was told to stop (SIGTERM, Ctrl-C, SIGUSR1, time limit, or a storage that refuses where the recipe "
        "says to stop) and left a whole checkpoint first. Exit code 75 asks a scheduler to queue it again.",
        ("the same command goes on, and so does `thawline resume RUN`: bit for bit as if it had never stopped",),
    ),
    Page("0", "Done."),
    Page(
        "1",
        "It ended for a reason of its own, such as a loss that stays not finite, memory that ran out, or a file that "
        "the system refuses; the message says which. For `thawline diff`: there are differences.",
        ("`thawline --traceback VERB ...` shows where in the code an error arose",),
    ),
    Page("2", "A recipe or the usage is wrong: see RecipeError, SelectorError, MissingExtra.", _RECIPE_HELP),
    Page("3", "The data are wrong: see DataError.", ("`thawline data check LIST`",)),
    Page("4", "A checkpoint or base does not fit: see CheckpointError, BaseMismatch.", _BASE_HELP),
    Page("5", "A law was broken: see LawBroken.", ("`thawline audit RUN` says what changed",)),
    Page("75", "Stopped early with a whole checkpoint: see Stopped.", ("`thawline resume RUN` goes on",)),
    Page("130", "Interrupted (Ctrl-C) where there was no training to stop: nothing half done is left."),
    Page("141", "Whoever read the output has left, as `head` does; the rest of it was not written."),
    Page(
        "EXACT",
        "Grade of a resume: the run goes on with the same bits as if it had never stopped.",
        ("`thawline resume RUN --verify 5` repeats the last five recorded steps first, and compares bits",),
    ),
    Page(
        "SAME-DATA",
        "Grade of a resume: every step sees the same samples with the same masks, but sums round differently here "
        "(another processor, device, version or kernel flag). The reasons are listed.",
    ),
    Page(
        "CONTINUES",
        "Grade of a resume: nothing is lost or repeated, but a key of the recipe or the data differ from those the "
        "run began with, as --allow said they may.",
    ),
    Page(
        "no-gradient",
        "Something that the plan trains got no gradient in the first step of a phase, so it would never move. The "
        "finding says why as far as it can be seen: unused, detached, under no_grad or inference_mode, or cut off by "
        "a reentrant checkpoint.",
        ("freeze what is meant not to train", "mend what cuts the gradient off; the finding names the modules"),
    ),
    Page("no-gradient-at-all", "Nothing that trains got a gradient; the findings beside it say why."),
    Page(
        "find-unused-parameters",
        "Some of what trains is not used in every step. Under DistributedDataParallel the reducer would wait for it.",
        ("freeze what is never used",),
    ),
    Page(
        "frozen-with-gradient",
        "Frozen parameters hold an old gradient. It does not move them, but it inflates the norm that clipping sees.",
        ("apply the plan again; clip over frozen.trainable_parameters()",),
    ),
    Page("frozen-written", "A forward pass wrote into tensors that are frozen.", ("pin the module that does",)),
    Page(
        "checkpoint-harmless",
        'The warning "None of the inputs have requires_grad=True" where nothing trains: it means nothing there. '
        "Where something does train, it is an error of its own (no-gradient).",
    ),
    Page("requires-grad", "Something changed requires_grad after the plan was applied.", ("apply the plan last",)),
    Page(
        "not-in-optimizer",
        "Parameters train but the optimizer does not know them: they never move.",
        ("build the optimizer from frozen.param_groups(...)",),
    ),
    Page(
        "not-in-plan",
        "The optimizer holds frozen parameters; weight decay or old moments can move them.",
        ("build the optimizer from frozen.param_groups(...)",),
    ),
    Page(
        "not-in-model",
        "The optimizer holds tensors that the model no longer has.",
        ("build it after the model is complete",),
    ),
    Page("lr-zero", "A rate of 0 is no freeze: statistics still move, and a scheduler may raise it.", ("freeze it",)),
    Page(
        "norm-drifts",
        "Frozen normalisation layers are in train mode, so their statistics will move with every batch.",
        ("norms: pinned keeps them", "norms: tracking says that they are meant to adapt"),
    ),
    Page(
        "norm-tracks", "Statistics adapt to the new data, as norms: tracking says; frozen parts then answer otherwise."
    ),
    Page(
        "norm-unlearned",
        "Normalisation layers are pinned to statistics that were never learned (mean 0, no batch counted).",
        ("norms: tracking, or load the buffers of the base too",),
    ),
    Page("not-pinned", "Frozen modules follow train(): their dropout stays on.", ("apply the plan",)),
    Page("train-patched", "train() was replaced on a module; eval() may not do what it says.", ("remove the patch",)),
    Page(
        "cudnn-rnn",
        "On a GPU, cuDNN passes no gradient through a recurrent layer in eval mode.",
        ("train it too, or switch cuDNN off for it",),
    ),
    Page("decay-only", "A gradient is zero everywhere, so weight decay alone moves the tensor.", ("freeze it",)),
    Page(
        "not-finite",
        "A loss or a gradient is infinite or not a number. The step is skipped, counted, and listed with its samples; "
        "after several in a row the run stops or goes back, as the recipe says.",
        ("a lower optim.lr, a longer warm-up, or fp32", "look at the samples that events.jsonl lists"),
    ),
    Page(
        "average-drifts",
        "A running average of frozen tensors is no longer the tensor itself: d*a + (1-d)*a rounds.",
        ("average only what trains",),
    ),
    Page("average-over-frozen", "A running average covers frozen tensors, and will drift.", ("average what trains",)),
    Page("recompiles", "More phases than torch.compile keeps graphs for.", ("thaw more layers at a time",)),
)
"""Every word that has a page."""


def explain(word: str) -> Page:
    """The page about an exit code, an error, a doctor's finding or a grade. Raises RecipeError with near names."""
    pages = {page.title.lower(): page for page in PAGES}
    asked = word.lower()
    if asked not in pages and asked.startswith("no-gradient-"):
        asked = "no-gradient"
    if asked not in pages:
        near = near_names(asked, list(pages))
        raise RecipeError(
            f"there is no page about {word!r}",
            fix=(f"did you mean {pages[near[0]].title}? " if near else "")
            + f"known: {', '.join(page.title for page in PAGES)}",
        )
    return pages[asked]
