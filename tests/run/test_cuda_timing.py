"""How ``bench/lora_linear.py`` times a GPU: on a stand-in for the device, and on a GPU where there is one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mbf.ops import draw_seed
from mbf.run.doctor import Gpu
from mbf.run.layers import Case, Operands, Variant, draw, frozen_layer, fused_layer, peft_layer, problems

CASE = Case(64, 96, 4, 0.1, 33, "bf16")


# -- timing on a stand-in for the device ---------------------------------------------------------------------------


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


class Generator:
    """Draws while a capture that was cut off holds its state are refused, as torch refuses them."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(capturing=False)

    def graphsafe_get_state(self) -> Any:
        return self.state

    def clone_state(self) -> Any:
        return SimpleNamespace(capturing=False)

    def graphsafe_set_state(self, state: Any) -> None:
        self.state = state


class Device:
    """torch.cuda with a clock in milliseconds, which only calls, replays and flushes move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.current = self.default = Stream()
        self.generator = Generator()
        self.capturing = self.poisoned = False
        self.warm = self.replays = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class CUDAGraph:
            cost = 0.0

            def replay(self) -> None:
                device.now += self.cost
                device.replays += 1

        class graph:
            def __init__(self, graph: CUDAGraph, stream: Stream) -> None:
                self.graph, self.stream = graph, stream

            def __enter__(self) -> None:
                self.before, self.start = device.current, device.now
                device.current = self.stream
                device.capturing = device.generator.state.capturing = True

            def __exit__(self, *args: object) -> None:
                device.capturing = False
                if device.poisoned:
                    device.poisoned = False
                    raise RuntimeError("operation failed due to a previous error during capture")
                device.generator.state.capturing = False
                device.current = self.before
                self.graph.cost, device.now = device.now - self.start, self.start

        @contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            before, device.current = device.current, stream
            yield
            device.current = before

        parts = {"Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream, "Stream": Stream}
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.current)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(device, "current", stream))
        monkeypatch.setattr(torch.cuda, "default_generators", [device.generator])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def layer(self, forward: float, backward: float, waits: bool = False) -> Variant:
        """A variant that takes so many milliseconds, and cannot be captured if it ``waits`` for the device."""

        def spend(time: float) -> None:
            self.now += time

        def run(x: Tensor) -> Tensor:
            if self.capturing and waits:
                self.poisoned = True
                raise ValueError("it waits for the device\nand more")
            assert not self.generator.state.capturing or self.capturing
            self.warm += not self.capturing
            spend(forward)
            y = x.clone()
            y.register_hook(lambda gradient: spend(backward))
            return y

        return Variant(run, ())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    found.install(monkeypatch)
    return found


@pytest.fixture
def given() -> Operands:
    x = torch.randn(3, 5, requires_grad=True)
    nothing = torch.empty(0)
    return Operands(torch.nn.Parameter(nothing), nothing, nothing, x, torch.randn(3, 5))


def test_a_call_is_a_replay(bench_file: Any, device: Device, given: Operands) -> None:
    timing = bench_file("cuda_timing")
    calls = timing.prepare(device.layer(2, 3), given, Stream())
    assert calls.note == "" and device.warm == 2 * timing.WARM_UPS and device.current is device.default
    start = device.now
    calls.forward()
    assert device.now - start == 2
    calls.both()
    assert device.now - start == 2 + 5
    assert device.replays == 2 and device.warm == 2 * timing.WARM_UPS


def test_what_cannot_be_captured_is_called(bench_file: Any, device: Device, given: Operands) -> None:
    timing = bench_file("cuda_timing")
    state = device.generator.state
    calls = timing.prepare(device.layer(2, 3, waits=True), given, Stream())
    assert calls.note == "ValueError: it waits for the device"
    assert device.current is device.default
    assert device.generator.state is state and not state.capturing
    start = device.now
    calls.both()
    assert device.now - start == 5 and device.replays == 0
    assert timing.prepare(device.layer(2, 3), given, Stream()).note == ""


def test_the_flush_is_not_timed(bench_file: Any, device: Device, given: Operands) -> None:
    timing = bench_file("cuda_timing")
    flushed = []

    def flush() -> None:
        flushed.append(device.now)
        device.now += 100

    calls = timing.prepare(device.layer(2, 3), given, Stream())
    assert timing.timed(calls, flush, 4) == pytest.approx((2e-3, 3e-3, 5e-3))
    assert len(flushed) == 2 * 4


def test_rounds_take_turns_on_fresh_data(
    bench_file: Any, monkeypatch: pytest.MonkeyPatch, device: Device, given: Operands
) -> None:
    timing = bench_file("cuda_timing")
    monkeypatch.setattr(timing, "flusher", lambda where: lambda: None)
    seen = []
    monkeypatch.setattr(Operands, "refresh", lambda self: seen.append(device.now))
    variants = {"frozen": device.layer(0.1, 0.15), "slow": device.layer(2, 3), "waits": device.layer(1, 1, waits=True)}
    (times, rounds, repeats), notes = timing.sample(variants, given, 5, 60.0)
    assert (rounds, repeats) == (5, 4)  # four calls of a quarter of a millisecond make a sample
    assert notes == {"waits": "ValueError: it waits for the device"}
    for name, expected in {"frozen": (1e-4, 1.5e-4, 2.5e-4), "slow": (2e-3, 3e-3, 5e-3), "waits": (1e-3,) * 2}.items():
        assert len(times[name]) == 5
        assert all(one[: len(expected)] == pytest.approx(expected) for one in times[name])
    assert len(set(seen)) == 1 + 5
    assert timing.sample(variants, given, 5, 0.0)[0].rounds == 3


def test_a_row(bench_file: Any, monkeypatch: pytest.MonkeyPatch, device: Device, given: Operands) -> None:
    script, timing = bench_file("lora_linear"), bench_file("cuda_timing")
    drawn: list[Any] = []
    monkeypatch.setattr(script, "draw", lambda case, where: drawn.append((case, where)) or given)
    monkeypatch.setattr(script, "build", lambda *_: {"frozen": device.layer(2, 3), "peft": device.layer(4, 5)})
    monkeypatch.setattr(script, "check", lambda *_: [])
    monkeypatch.setattr(timing, "flusher", lambda where: lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 35_000_000)
    found = script.measure(CASE, Namespace(device="cuda", compile=False, rounds=4, budget=60.0))
    assert drawn == [(CASE, "cuda")]
    assert found.peaks == {"frozen": 25.0, "peft": 25.0} and found.not_captured == {}
    assert found.samples.seconds["peft"] == [pytest.approx((4e-3, 5e-3, 9e-3))] * 4


def test_facts_of_a_gpu(bench_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = bench_file("common")
    properties = {"name": "G", "major": 9, "minor": 0, "multi_processor_count": 132, "uuid": "12-34"}
    sizes = {"total_memory": 80 << 30, "L2_cache_size": 50 << 20}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(**properties, **sizes))
    monkeypatch.setattr(common, "gpus", {"GPU-12-34": [Gpu("G", "9.0", "80 GiB", "570.86", "SM 1 MHz")]}.__getitem__)
    found = common.facts("cuda")
    assert (found["device"], found["capability"], found["memory"], found["L2"]) == ("G", "9.0", "80.0 GiB", "50 MiB")
    assert found["clocks before"] == "SM 1 MHz" and found["cuda"] == torch.version.cuda
    assert {"torch", "driver", "triton", "triton kernels", "cpu"} <= set(found)
    monkeypatch.setattr(common, "gpus", lambda uuid: [])
    assert common.clocks().startswith("not known: nvidia-smi")


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_script(bench_file: Any, capsys: Any) -> None:
    assert bench_file("lora_linear").main(["--device", "cuda", "--quick", "--rounds", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"device: {torch.cuda.get_device_name()}" in printed
    assert "clocks before: " in printed and "clocks after: " in printed and "not captured" not in printed


@pytest.mark.gpu
def test_layers_are_captured(bench_file: Any) -> None:
    given = draw(CASE, "cuda")
    variants = {"frozen": frozen_layer(given), "peft": peft_layer(given, 0.1), "mbf": fused_layer(given, 0.1)}
    before = given.x.detach().clone()
    samples, notes = bench_file("cuda_timing").sample(variants, given, 3, 60.0)
    assert notes == {} and samples.rounds == 3
    assert all(forward > 0 and both > 0 for one in samples.seconds.values() for forward, _, both in one)
    assert not torch.equal(given.x, before)


@pytest.mark.gpu
def test_replays_draw_anew(bench_file: Any) -> None:
    timing = bench_file("cuda_timing")
    stream = torch.cuda.Stream()
    seed, kept = draw_seed("cuda"), torch.empty(1000, device="cuda")

    def run() -> None:
        seed.copy_(draw_seed("cuda"))
        kept.copy_(torch.nn.functional.dropout(torch.ones_like(kept), 0.5))

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run()
    graph = timing.capture(run, stream)
    found = []
    for _ in range(2):
        graph.replay()
        found.append((seed.item(), kept.tolist()))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


@pytest.mark.gpu
def test_a_failed_capture_harms_nothing(bench_file: Any) -> None:
    timing = bench_file("cuda_timing")
    stream = torch.cuda.Stream()
    x = torch.rand(8, device="cuda")
    torch.cuda.synchronize()
    earlier = timing.capture(lambda: x.copy_(torch.rand_like(x)), stream)
    with pytest.raises(timing.NotCapturedError, match=r"\w+: "):
        timing.capture(lambda: (torch.rand_like(x), x.sum().item()), stream)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert 0 <= torch.rand(1, device="cuda").item() < 1
    before = x.clone()
    earlier.replay()
    timing.capture(lambda: x.add_(1), stream).replay()
    assert x.min() >= 1 and not torch.equal(x, before + 1)


@pytest.mark.gpu
def test_peak_is_what_a_call_allocates(bench_file: Any) -> None:
    given = draw(Case(1024, 2048, 4, 0.0, 512, "fp32"), "cuda")
    y, dx = 4 * 512 * 2048, 4 * 512 * 1024
    assert bench_file("cuda_timing").peak_mb(frozen_layer(given), given) == pytest.approx((y + dx) / 1e6, rel=0.05)


@pytest.mark.gpu
def test_a_layer_left_to_plain_torch_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(CASE, "cuda")
    assert problems(fused_layer(given, 0.1), given, 0.1) == []
    for module in ("mbf.ops._gpu", "mbf.run.layers"):
        monkeypatch.setattr(f"{module}.obstacle", lambda: "no triton")
    assert problems(fused_layer(given, 0.1), given, 0.1) == ["the layer was left to plain torch: no triton"]


@pytest.mark.gpu
def test_the_check_leaves_the_generators() -> None:
    given = draw(CASE, "cuda")
    fused = fused_layer(given, 0.1)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert problems(fused, given, 0.1) == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
