"""Damages of layers from runs that perturb all of them: against one layer at a time."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mxfp8 import kernels
from mxfp8.quant.budget.probing import (
    needed_runs,
    perturbed,
    probe,
    probe_module,
    signs_of,
)
from mxfp8.quant.budget.sensitivity import Sample, Sensitivity, check_work
from mxfp8.quant.container.header import FormatError
from mxfp8.quant.conversion import calibration

LAYERS = {f"layers.{i}.linear": 1000 * (1 + i % 4) for i in range(24)}
SIZE = 4096  # values of an output: the changes of two layers have a cosine of 1 / 64


class Linear:
    """A model whose output changes by a random vector for each layer, of known energy."""

    def __init__(self, seed: int = 0, scales=(1.0, 1.0), noise: float = 0.0):
        draw = torch.Generator().manual_seed(seed)
        self.reference = torch.randn(len(scales), SIZE, generator=draw)
        amplitude = torch.exp(1.5 * torch.randn(len(LAYERS), generator=draw)) * 1e-3
        changes = torch.randn(len(scales), len(LAYERS), SIZE, generator=draw)
        self.changes = changes * amplitude[:, None] * torch.tensor(scales)[:, None, None]
        self.noise, self.draw, self.runs = noise, draw, 0

    def __call__(self, sample: int, signs: dict[str, int]) -> torch.Tensor:
        self.runs += 1
        output = self.reference[sample].clone()
        for index, name in enumerate(LAYERS):
            output += signs.get(name, 0) * self.changes[sample, index]
        if signs:
            output += self.noise * torch.randn(SIZE, generator=self.draw)
        return output

    @property
    def damages(self) -> torch.Tensor:
        energy = self.changes.double().square().sum(-1)
        return (energy / self.reference.double().square().sum(-1, keepdim=True)).log().mean(0).exp()


def damages(sensitivity: Sensitivity) -> torch.Tensor:
    found = sensitivity.damages
    assert list(found.values) == list(LAYERS)
    return torch.tensor(list(found.values.values()), dtype=torch.float64)


def off(found: torch.Tensor, model: Linear) -> torch.Tensor:
    """Of the sum of all damages, the part that is put on the wrong layer."""
    return (found - model.damages).abs().sum() / (2 * model.damages.sum())


@pytest.mark.parametrize("seed", range(4))
def test_few_runs_find_the_damages(seed):
    model = Linear(seed)
    runs = needed_runs(len(LAYERS)) // 2  # of each of two samples: 14 for 24 layers
    found = damages(probe(LAYERS, model, samples=2, runs=runs))
    assert model.runs == 2 * (1 + runs) < len(LAYERS)
    assert off(found, model) < 0.2
    assert found.sum() / model.damages.sum() == pytest.approx(1, abs=0.1)


def test_enough_runs_find_every_damage():
    """With a row of the matrix for every layer, each run of the model's is told apart."""
    model = Linear()
    found = damages(probe(LAYERS, model, samples=2, runs=100))
    assert model.runs == 2 * (1 + 32)  # the matrix has no more rows
    large = model.damages > 0.05 * model.damages.sum()
    assert torch.allclose(found[large], model.damages[large], rtol=0.1)


def test_noise_of_the_runs_is_no_damage():
    """As of BF16: in each run a twentieth of what all layers do."""
    model = Linear()
    model.noise = float(
        (0.05 * model.damages.sum() * model.reference[0].square().sum() / SIZE).sqrt()
    )
    found = damages(probe(LAYERS, model, samples=2, runs=24))
    assert found.sum() / model.damages.sum() == pytest.approx(1, abs=0.06)
    assert off(found, model) < 0.1


def test_samples_count_alike():
    """The mean is that of decibels, so a sample of small changes is not lost beside a large one."""
    model = Linear(scales=(1.0, 10.0, 0.1, 1.0))
    found = damages(probe(LAYERS, model, samples=4, runs=16))
    assert found.sum() / model.damages.sum() == pytest.approx(1, abs=0.1)
    assert off(found, model) < 0.15


def test_standard_errors_tell_what_is_known():
    """Roughly, from four samples: of 12 totals, 8 are within two of their standard errors."""
    names, within = list(LAYERS)[::2], 0
    for seed in range(12):
        model = Linear(seed, scales=(1.0,) * 4)
        found = probe(LAYERS, model, samples=4, runs=8).damages
        error = found.total(names) - float(model.damages[::2].sum())
        within += abs(error) <= 2 * found.deviation(names)
    assert within >= 7


def test_signs():
    names = list(LAYERS)
    first, second = (signs_of(names, sample, 32) for sample in (0, 1))
    assert first == signs_of(names, 0, 32) != second
    assert signs_of(names, 0, 8) == signs_of(names, 0, 8)
    for rows in (first, second):
        assert set(rows[0].values()) == {1}
        matrix = torch.tensor([[row[name] for name in names] for row in rows])
        assert (matrix.t() @ matrix == 32 * torch.eye(len(names), dtype=torch.int64)).all()


def test_interactions_are_seen():
    model = Linear()
    model.changes[:, 1] = model.changes[:, 0]  # together they do four times what each does
    found = probe(LAYERS, model, samples=2, runs=32)
    joint = model.changes.sum(1).square().sum(-1) / model.reference.square().sum(-1)
    expected = joint.log().mean().exp() / model.damages.sum()
    assert found.together == pytest.approx(float(expected), rel=0.05)


# ---- interruption ----------------------------------------------------------------------------


def test_an_interrupted_measurement_goes_on(tmp_path):
    class StopError(Exception):
        pass

    whole = probe(LAYERS, Linear(), samples=2, runs=3)
    journal, asked = tmp_path / "runs", []
    interruptions = 0
    while True:
        model = Linear()

        def run(sample, signs, model=model):
            if model.runs == 1:
                raise StopError
            asked.append((sample, tuple(signs.values())))
            return model(sample, signs)

        try:
            found = probe(LAYERS, run, samples=2, runs=3, journal=journal)
            break
        except StopError:
            interruptions += 1
            assert journal.exists()
    assert interruptions == 7
    assert len(asked) == len(set(asked)) == 8  # nothing ran twice
    assert found == whole
    assert not list(tmp_path.iterdir())


def test_a_journal_of_other_runs_is_an_error(tmp_path):
    journal = tmp_path / "runs"

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    options = {"samples": 2, "runs": 3, "journal": journal}
    with pytest.raises(KeyboardInterrupt):
        probe(LAYERS, Linear(), model="one", on_run=stop, **options)
    before = journal.read_bytes()
    with pytest.raises(ValueError, match="another model"):
        probe(LAYERS, Linear(), model="other", **options)
    assert journal.read_bytes() == before
    save_file({"0": torch.zeros(4)}, journal)
    for damaged in (journal.read_bytes(), before[:-1], b""):
        journal.write_bytes(damaged)
        with pytest.raises(FormatError) as error:
            probe(LAYERS, Linear(), model="one", **options)
        assert f"{journal} is not a journal of probe runs; delete it" in str(error.value)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.full((4,), torch.nan), "NaN"),
        (torch.zeros(4), "zero"),
        (torch.full((4,), torch.inf), "Inf"),
    ],
)
def test_unusable_outputs(output, message):
    with pytest.raises(ValueError, match=message):
        probe(LAYERS, lambda sample, signs: output, samples=1, runs=2)


def test_outputs_of_several_shapes():
    with pytest.raises(ValueError, match="same shape"):
        probe(LAYERS, lambda sample, signs: torch.ones(4 + bool(signs)), samples=1, runs=2)


@pytest.mark.parametrize("arguments", [({}, 1, 1), (LAYERS, 0, 1), (LAYERS, 1, 0)])
def test_nothing_to_measure(arguments):
    layers, samples, runs = arguments
    with pytest.raises(ValueError, match="at least one"):
        probe(layers, Linear(), samples=samples, runs=runs)


def test_more_runs_than_can_be_computed_are_an_error_before_the_first():
    model = Linear()
    for samples, runs in ((5000, 4), (4000, 1000)):
        with pytest.raises(ValueError, match="fewer samples or runs"):
            probe(LAYERS, model, samples=samples, runs=runs)
    assert model.runs == 0
    check_work(4096, [needed_runs(4096)])  # what is planned for the most layers is allowed


# ---- torch modules ---------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    widths = 64, 96, 64, 128, 96, 64, 96
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU(), nn.LayerNorm(after)]
    return nn.Sequential(*layers).eval()


def linears(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def inputs(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 64, 64, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def test_plus_rounds_and_minus_does_the_opposite():
    module, (x,) = network(), inputs(1)
    weight = module[0].weight.detach().clone()
    rounded = kernels.dequantize(*kernels.quantize(weight), torch.float32, tuple(weight.shape))
    plain = module(x)
    for sign, expected in ((1, rounded), (-1, 2 * weight - rounded)):
        with perturbed(module, {"0": sign}):
            found = module[0](x)
        assert torch.equal(found, nn.functional.linear(x, expected, module[0].bias))
    with pytest.raises(KeyboardInterrupt), perturbed(module, {"0": 1}):
        raise KeyboardInterrupt
    assert torch.equal(module(x), plain) and torch.equal(module[0].weight, weight)


@torch.no_grad()
def test_a_module_against_one_layer_at_a_time():
    module, batches = network(), inputs(2)
    names = linears(module)
    found = probe_module(module, batches, lambda m, x: m(x), names, runs=8).damages
    for name in names:
        energies = []
        for x in batches:
            plain = module(x)
            with perturbed(module, {name: 1}):
                energies.append((module(x) - plain).square().sum() / plain.square().sum())
        alone = float(torch.stack(energies).log().mean().exp())
        # Within what six layers' changes have in common: 64 x 96 values, and weights share inputs.
        assert found.values[name] == pytest.approx(alone, rel=0.3)


def test_only_linear_layers_are_probed():
    with pytest.raises(ValueError, match="GELU"):
        probe_module(network(), inputs(1), lambda m, x: m(x), ["1"])


# ---- files -----------------------------------------------------------------------------------


def calibrated(tmp_path):
    module, batches = network(), inputs(2)
    found = calibration.calibrate(module, batches, lambda m, x: m(x))
    measured = probe_module(module, batches, lambda m, x: m(x), linears(module))
    return replace(found, sensitivity=replace(measured, about={"steps": 20}))


def test_sensitivities_go_with_a_calibration(tmp_path):
    path, plain = tmp_path / "c.safetensors", tmp_path / "plain.safetensors"
    found = calibrated(tmp_path)
    found.save(path)
    replace(found, sensitivity=None).save(plain)
    assert calibration.load(path).sensitivity == found.sensitivity
    assert calibration.load(plain).sensitivity is None
    # All else is as it was: earlier versions of the pack read the file.
    with safe_open(path, "pt") as one, safe_open(plain, "pt") as other:
        texts = one.metadata()
        del texts["mxfp8_sensitivity"]
        assert texts == other.metadata() and list(one.keys()) == list(other.keys())


def test_sensitivities_of_other_layers_are_rejected(tmp_path):
    found = calibrated(tmp_path)
    layers = ("unknown", *found.sensitivity.layers[1:])
    found = replace(found, sensitivity=replace(found.sensitivity, layers=layers))
    found.save(tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match="unknown"):
        calibration.load(tmp_path / "c.safetensors")


def test_damaged_sensitivities_are_named_with_their_file(tmp_path):
    path = tmp_path / "c.safetensors"
    calibrated(tmp_path).save(path)
    with safe_open(path, "pt") as source:
        texts = source.metadata()
        tensors = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
    texts["mxfp8_sensitivity"] = texts["mxfp8_sensitivity"][:-20]
    save_file(tensors, path, texts)
    with pytest.raises(FormatError, match=r"c\.safetensors: .*calibrate again"):
        calibration.load(path)


def damaged():
    good = {
        "mxfp8_sensitivity": 1, "layers": ["a", "b"], "sizes": [1, 1],
        "samples": [{"signs": ["++", "+-"], "gram": [[1.0, 0.0], [0.0, 1.0]]}],
    }  # fmt: skip
    assert Sensitivity.from_json(json.dumps(good)).runs == 2
    for key, value in (
        ("layers", ["a"]), ("layers", ["a", "a"]), ("sizes", [1]), ("sizes", [0, 1]),
        ("samples", []), ("samples", [{"signs": ["++"], "gram": [[1.0, 0.0]]}]),
        ("samples", [{"signs": ["+*"], "gram": [[1.0]]}]),
        ("samples", [{"signs": ["+"], "gram": [[1.0]]}]),
        ("samples", [{"signs": ["++"], "gram": [[-1.0]]}]),
        ("samples", [{"signs": ["++"], "gram": [["1"]]}]),
        ("samples", 5000 * [{"signs": ["++"], "gram": [[1.0]]}]),
        ("samples", [{"signs": 600 * ["++"], "gram": 600 * [600 * [1.0]]}]),
        ("samples", [{"signs": ["++"], "gram": [[1e300]]}]),
        *(("samples", [{"signs": ["++", "+-"], "gram": [[1.0, a], [b, 1.0]]}])
          for a, b in ((5.0, 5.0), (-5.0, -5.0), (0.5, -0.5), (1e300, 1e300))),
        ("factors", {"a": 1.0}), ("mxfp8_sensitivity", 2),
    ):  # fmt: skip
        yield good | {key: value}


@pytest.mark.parametrize("document", list(damaged()))
def test_damaged_sensitivities(document):
    with pytest.raises(FormatError):
        Sensitivity.from_json(json.dumps(document))


def test_sensitivities_of_earlier_versions():
    """They have factors of calibrated rounding, which no choice used."""
    good = Sensitivity(("a", "b"), (1, 1), (Sample(("++",), ((1.0,),)),))
    older = json.loads(good.to_json()) | {"rounding": {"a": 0.5}}
    assert Sensitivity.from_json(json.dumps(older)) == good


def test_runs_without_any_change():
    sample = Sample(("++", "+-"), ((0.0, 0.0), (0.0, 0.0)))
    found = Sensitivity(("a", "b"), (1, 1), (sample,))
    assert found.damages.total(["a", "b"]) == 0
    assert found.together is None


def test_load_file_is_unchanged(tmp_path):
    """Tensors are what they were without sensitivities."""
    found = calibrated(tmp_path)
    found.save(tmp_path / "c.safetensors")
    names = {name.rpartition(".")[0] for name in load_file(tmp_path / "c.safetensors")}
    assert names == set(found.layers)
