"""Probe runs: a model run with all its layers perturbed by their own rounding error.

What runs the model is given as a function, so that the same runs serve a torch module here and a
sampler in ComfyUI. Perturbed weights are made when a layer runs and dropped after it: a run needs
no more memory than one layer's weight in float32.

Runs can take hours. With a journal each run's output is on the disk when the next one starts, and
the same call goes on there after an interruption.

Rejected: probe runs that perturb only some of a sampler's steps, to tell early from late ones. On
the emoji model of tests/models rounding all layers in the last 10 of 20 steps does 0.91 of what it
does in all of them, and in the first 10 less than 0.01; the choice of layers is the same for all
steps, so it would not use more. A run that starts at the middle would take half the time, but
would have to make every sampler do so.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ... import kernels
from ..container.header import FormatError, quoted
from ..container.writer import Writer
from ..format import bare
from ..reports import metrics
from ..sources.file import FileSource, as_bytes
from .sensitivity import Sample, Sensitivity, check_work

Signs = Mapping[str, int]  # layer -> 1 or -1
Run = Callable[[int, Signs], torch.Tensor]

_JOURNAL = "mxfp8_probe_runs"


def needed_runs(layers: int) -> int:
    """Probe runs, of all samples together, that tell so many layers apart well.

    For MiniLM's 36 layers 17. Against damages measured one layer at a time, choices lost 1.1 dB
    with 6 runs, 0.5 with 10, 0.2 with 14, 0.1 with 18 and 0.01 with 34 (two draws of the signs,
    mean of six sizes). So short calibrations get no fewer.
    """
    return max(4, math.ceil(2 * math.sqrt(2 * layers)))


def signs_of(layers: Sequence[str], sample: int, runs: int) -> list[dict[str, int]]:
    """The signs of a sample's runs; the first run has all plus, so it rounds every layer.

    They are rows of a Hadamard matrix, with a column for each layer, other ones in every sample.
    A sample gets no more runs than the matrix has rows: from there on all layers are told apart.
    """
    size = 1 << len(layers).bit_length()  # more than the layers: column 0 is constant
    draw = random.Random(sample)
    columns = draw.sample(range(1, size), len(layers))
    rows = [0, *draw.sample(range(1, size), min(runs, size) - 1)]
    return [
        {
            name: -1 if (row & c).bit_count() % 2 else 1
            for name, c in zip(layers, columns, strict=True)
        }
        for row in rows
    ]


def probe(
    layers: Mapping[str, int],
    run: Run,
    samples: int,
    runs: int,
    *,
    about: Mapping[str, object] | None = None,
    model: str = "",
    journal: str | os.PathLike | None = None,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Measure how sensitive a model's output is to the rounding of its layers.

    Args:
        layers: name -> number of weights, of the layers to perturb.
        run: (sample, signs) -> the model's output, any shape, float, the same each time it is
            called with the same arguments: with each layer's weight W replaced by
            W + sign (Q(W) - W), Q rounding to nearest; with no signs, by nothing.
        samples: how many prompts and seeds, or batches, there are.
        runs: probe runs of each; `run` is called `samples * (runs + 1)` times.
        about: how the model is run, as JSON types.
        model: its fingerprint; a journal of another model is an error.
        journal: a file that keeps the runs until all are done.
        on_run: (runs done, all runs) before each run; what it raises passes through.

    Raises:
        ValueError: no layer, no sample or no run, or more than `check_work` allows; an output that
            is not finite or is zero; or a journal of other runs.
        OSError: the journal cannot be read or written.
    """
    if not layers or samples < 1 or runs < 1:
        raise ValueError(
            f"{len(layers)} layers, {samples} samples and {runs} runs: at least one of each is "
            "needed to measure sensitivities"
        )
    names = list(layers)
    check_work(len(names), [len(signs_of(names, 0, runs))] * samples)
    plan = [signs_of(names, sample, runs) for sample in range(samples)]
    total = sum(1 + len(signs) for signs in plan)
    kept = _Journal(journal, {"model": model, "layers": names, "samples": samples, "runs": runs,
                              "about": dict(about or {})})  # fmt: skip
    done = 0
    found = []
    for sample, signs in enumerate(plan):
        outputs = []
        gram = kept.gram(sample)
        if gram is None:
            for index, given in enumerate([{}, *signs]):
                output = kept.output(sample, index)
                if output is None:
                    on_run(done + index, total)
                    output = metrics.flat(run(sample, given))
                    _check_output(output, outputs, given)
                    kept.add(sample, index, output)
                outputs.append(output)
            gram = _gram(outputs)
            kept.finish(sample, gram)
        done += 1 + len(signs)
        rows = tuple("".join("+" if one[n] > 0 else "-" for n in names) for one in signs)
        found.append(Sample(rows, gram))
    on_run(total, total)
    kept.remove()
    return Sensitivity(
        tuple(map(bare, names)), tuple(layers.values()), tuple(found), about=dict(about or {})
    )


def _check_output(output: torch.Tensor, before: list[torch.Tensor], signs: Signs) -> None:
    what = "with perturbed layers" if signs else "without any change"
    problem = metrics.latent_problem(output)
    if problem:
        raise ValueError(f"the model's output {what} is unusable: {problem}")
    if before and before[0].numel() != output.numel():
        raise ValueError(
            f"the model's output {what} has {output.numel()} values and {before[0].numel()} "
            "without; runs of a sample must have the same shape"
        )


def _gram(outputs: list[torch.Tensor]) -> tuple[tuple[float, ...], ...]:
    reference, *others = (output.double() for output in outputs)
    changes = torch.stack([other - reference for other in others])
    gram = changes @ changes.t() / reference.square().sum()
    return tuple(map(tuple, gram.tolist()))


class _Journal:
    """Outputs of the runs so far, in a file that is replaced after every run; or nowhere.

    Of samples that are finished, only the inner products are kept.
    """

    def __init__(self, path: str | os.PathLike | None, what: dict):
        self._path = None if path is None else Path(path)
        self._what = json.loads(json.dumps(what))
        self._grams: list = []
        self._outputs: list[torch.Tensor] = []
        if self._path is not None and self._path.exists():
            self._read()

    def _read(self) -> None:
        try:
            with FileSource(self._path) as source:
                state = json.loads(source.metadata[_JOURNAL])
                what, self._grams = state["what"], state["grams"]
                for index in range(len(source.tensors)):
                    (size,) = source.tensors[str(index)][1]
                    self._outputs.append(source.rows(str(index), 0, size).clone())
        except (KeyError, TypeError, ValueError) as error:  # FormatError too
            raise FormatError(
                f"{self._path} is not a journal of probe runs; delete it to start anew"
            ) from error
        if what != self._what:
            raise ValueError(
                f"{self._path} has probe runs of another model or of other settings; delete it to "
                "start anew"
            )

    def gram(self, sample: int) -> tuple | None:
        return tuple(map(tuple, self._grams[sample])) if sample < len(self._grams) else None

    def output(self, sample: int, index: int) -> torch.Tensor | None:
        current = sample == len(self._grams) and index < len(self._outputs)
        return self._outputs[index] if current else None

    def add(self, sample: int, index: int, output: torch.Tensor) -> None:
        if self._path is not None:
            self._outputs.append(output)
            self._write()

    def finish(self, sample: int, gram: tuple) -> None:
        if self._path is not None:
            self._grams.append(gram)
            self._outputs.clear()
            self._write()

    def _write(self) -> None:
        tensors = [(str(i), "F32", tuple(one.shape)) for i, one in enumerate(self._outputs)]
        state = json.dumps({"what": self._what, "grams": self._grams})
        with Writer(self._path, tensors, {_JOURNAL: state}, True) as writer:
            for i, output in enumerate(self._outputs):
                writer.write(str(i), as_bytes(output))

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


# ---- torch modules ---------------------------------------------------------------------------


@torch.no_grad()
def perturbed_weight(weight: torch.Tensor, sign: int) -> torch.Tensor:
    """W + sign (Q(W) - W) in float32, [N, K]; Q rounds to MXFP8, to nearest."""
    rounded = kernels.dequantize(*kernels.quantize(weight), torch.float32, tuple(weight.shape))
    return rounded if sign > 0 else 2 * weight.float() - rounded


@contextlib.contextmanager
def perturbed(module: nn.Module, signs: Signs) -> Iterator[None]:
    """A module whose linear layers run with weights W + sign (Q(W) - W), while this lasts.

    Args:
        signs: layer -> 1 or -1; others stay as they are.
    """
    before = {}
    try:
        for name, sign in signs.items():
            layer = module.get_submodule(name)
            before[layer] = layer.__dict__.get("forward")
            layer.forward = _forward(layer, sign)
        yield
    finally:
        for layer, forward in before.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _forward(layer: nn.Linear, sign: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:
        weight = perturbed_weight(layer.weight, sign).to(input.dtype)
        return nn.functional.linear(input, weight, layer.bias)

    return forward


@torch.no_grad()
def probe_module(
    module: nn.Module,
    batches: Iterable,
    output: Callable[[nn.Module, object], torch.Tensor],
    layers: Iterable[str],
    runs: int | None = None,
    **options,
) -> Sensitivity:
    """`probe` for a torch module, with batches as samples.

    Args:
        module: in eval mode.
        output: (module, batch) -> what the model is used for, such as embeddings.
        layers: names of `nn.Linear` modules.
        runs: of each batch; default: `needed_runs`.
    """
    batches = list(batches)
    sizes = {}
    for name in layers:
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{quoted(name)} is a {type(layer).__name__}, not a linear layer")
        sizes[name] = layer.weight.numel()

    def run(sample: int, signs: Signs) -> torch.Tensor:
        with perturbed(module, signs):
            return output(module, batches[sample])

    runs = needed_runs(len(sizes)) if runs is None else runs
    return probe(sizes, run, len(batches), runs, **options)
