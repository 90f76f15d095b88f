"""Trains a mixture-of-head language model on whatever JAX sees.

python experiments/train_moh.py               about five minutes on two cores
python experiments/train_moh.py --baseline    with the dense model beside it
python experiments/train_moh.py --resume      continues the newest run
python experiments/train_moh.py --help        every flag
"""

from jaxheads.errors import one_line_errors


@one_line_errors
def main() -> None:
  # Late, so that Ctrl-C while JAX loads is told in one line too.
  from jaxheads.training import parse, run_job

  run_job(parse())


if __name__ == "__main__":
  main()
