"""Trains a hybrid S2 language model on whatever JAX sees.

In its sharded layers each head sees the last tokens and its own share of the
older ones; its dense layers see everything.

python experiments/train_s2.py               about five minutes on two cores
python experiments/train_s2.py --baseline    with the dense model beside it
python experiments/train_s2.py --resume      continues the newest run
python experiments/train_s2.py --help        every flag

Every layer can route its heads besides: --model.router two_stage.
"""

from jaxheads.errors import one_line_errors


@one_line_errors
def main() -> None:
  # Late, so that Ctrl-C while JAX loads is told in one line too.
  from jaxheads.training import parse, run_job

  run_job(
    parse(
      prog="train_s2.py",
      preset="tiny-s2",
      what="a language model of sharded and dense layers",
    )
  )


if __name__ == "__main__":
  main()
