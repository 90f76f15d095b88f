import pytest

from pallas_kernels.aot import __main__ as command_line
from pallas_kernels.aot import compile as aot_compile
from pallas_kernels.aot import targets


def run(capsys, *flags):
  with pytest.raises(SystemExit) as caught:
    command_line.main(list(flags))
  printed = capsys.readouterr()
  assert printed.out == ""
  assert printed.err.count("\n") == 1
  return caught.value.code, printed.err


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "--chip"),
    (("--chip", "v3"), "'v3'"),
    (("--chip", "v5e", "--seq-len", "many"), "whole number, got 'many'"),
    (("--chip", "v5e", "--heads", "0"), "at least 1, got 0"),
    (("--chip", "v5e", "--stride", "-1"), "at least 0, got -1"),
    (("--chip", "v5e", "--dtype", "int8"), "'int8'"),
    (("--chip", "v5e", "--block", "48"), "`block_size` must be a power of two"),
    (("--chip", "v5e", "--block-q", "128"), "go together"),
    (
      ("--chip", "v5e", "--block-q", "100", "--block-kv", "128"),
      "`block_q` must be a power of two",
    ),
    pytest.param(
      ("--chip", "v5e", "--heads", "6", "--kv-heads", "4"),
      "divides q's 6",
      marks=pytest.mark.compile,
    ),
    pytest.param(
      ("--chip", "v5e", "--implementation", "cuda"),
      "`implementation`",
      marks=pytest.mark.compile,
    ),
    (("--chip", "v5e", "--length", "5"), "unrecognized arguments"),
    (("--chip", "v5e", "--operation", "mlp"), "'mlp'"),
    (("--chip", "v5e", "--page-dtype", "int8"), "is paged attention's"),
    (
      ("--chip", "v5e", "--operation", "paged_attention", "--backward"),
      "no gradients",
    ),
    (
      (
        *("--chip", "v5e", "--operation", "routed_attention"),
        *("--block-q", "128", "--block-kv", "128"),
      ),
      "head attention's",
    ),
    (
      (
        *("--chip", "v5e", "--operation", "paged_attention"),
        *("--heads", "6", "--kv-heads", "4"),
      ),
      "must divide the 6 heads",
    ),
  ],
)
def test_bad_flags_get_one_line(capsys, flags, message):
  code, text = run(capsys, *flags)
  assert code == 2
  assert message in text


def test_a_missing_compiler_is_named(capsys, monkeypatch):
  def missing(chip):
    raise targets.cuda_missing(chip)

  monkeypatch.setattr(targets, "device", missing)
  code, text = run(capsys, "--chip", "sm_90", "--seq-len", "256")
  assert code == 3
  assert "jax-cuda13-plugin" in text
  assert "pip install 'jaxheads[aot]'" in text


@pytest.mark.compile
@pytest.mark.parametrize(
  ("chip", "flags", "kernel"),
  [
    (
      "v5e",
      ("--operation", "paged_attention", "--page-dtype", "int8"),
      "paged_attention (1 x 1)",
    ),
    ("sm_90", ("--operation", "paged_attention"), "paged_attention"),
    (
      "sm_80",
      ("--operation", "routed_attention", "--backward"),
      "routed_attention_forward",
    ),
  ],
)
def test_other_operations(capsys, chip, flags, kernel):
  sizes = ("--seq-len", "1024", "--heads", "4", "--head-dim", "64")
  assert command_line.main(["--chip", chip, *flags, *sizes]) == 0
  lines = capsys.readouterr().out
  (named,) = [line for line in lines.splitlines() if "kernels" in line]
  assert kernel in named


@pytest.mark.compile
def test_a_refusal_is_an_answer(capsys):
  code = command_line.main(
    ["--chip", "sm_80", "--implementation", "mosaic_tpu"]
  )
  assert code == 1
  printed = capsys.readouterr().out
  assert printed.startswith("sm_80: does not compile: ")
  assert "TPU" in printed


def test_unknown_chips_are_listed():
  with pytest.raises(ValueError, match=r"`chip` must be one of v4, .*'v9'"):
    aot_compile.compile_for("v9", abs)


def test_aliases_and_descriptions_exist():
  assert targets.find("7x") is targets.find("tpu7x")
  for chip in targets.CHIPS.values():
    if chip.platform == "gpu":
      text = (targets.GPU_TARGETS / chip.target).read_text()
      major, minor = chip.name.removeprefix("sm_")[:-1], chip.name[-1]
      assert (
        f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text
      )


@pytest.mark.parametrize(
  ("message", "reason"),
  [
    ("INTERNAL: ptxas  failed\n badly", "ptxas failed badly"),
    ("x" * 300, "x" * 197 + "..."),
    (
      "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested "
      "393216, available: 166912, context: []",
      "shared memory exceeded: a kernel needs 393216 bytes, its limit is "
      "166912. Take smaller tiles.",
    ),
    (
      "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory "
      "in memory space vmem while allocating on stack for %x. Scoped "
      "allocation with size 83.12M and limit 16.00M exceeded scoped vmem limit "
      "by 67.12M.",
      "VMEM exceeded: a kernel needs 83.12M, its limit is 16.00M. Take smaller "
      "tiles.",
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
      "in memory space vmem. Used 256.00M of 127.94M vmem. Exceeded vmem "
      "capacity by 128.06M.",
      "VMEM exceeded: the program needs 256.00M, all of it has 127.94M. Take "
      "smaller tiles.",
    ),
    (
      "Mosaic GPU kernel exceeds available shared memory: smem_bytes=395352 > "
      "max_smem_bytes=232448",
      "shared memory exceeded: a kernel needs 395352 bytes, its limit is "
      "232448. Take smaller tiles.",
    ),
  ],
)
def test_short_reason(message, reason):
  assert aot_compile.short_reason(message) == reason


def test_sizes_are_readable():
  assert command_line.size_text(1023) == "1023 bytes"
  assert command_line.size_text(1536) == "1.5 KiB"
  assert command_line.size_text(3 << 29) == "1.50 GiB"
