"""Text in, batches of tokens out: tokenizers, corpora, and the Grain loader.

tokenizer = load_tokenizer("bytes")
corpus = load_corpus(None, tokenizer=tokenizer)
loader = make_loader(corpus.train, seq_len=256, batch_size=16, seed=0)
batch = next(loader)  # {"tokens", "targets", "mask"}, each [B, T]
"""

from ._copying import CopyTask as CopyTask
from ._corpus import Corpus as Corpus
from ._corpus import bits_per_byte as bits_per_byte
from ._corpus import load_corpus as load_corpus
from ._loader import Batch as Batch
from ._loader import Loader as Loader
from ._loader import make_loader as make_loader
from ._needle import NeedleTask as NeedleTask
from ._needle_batches import NeedleBatches as NeedleBatches
from ._needle_batches import Stage as Stage
from ._needle_batches import needle_batch as needle_batch
from ._prompts import EVALUATION_SEED as EVALUATION_SEED
from ._prompts import NEEDLE_VOCAB_SIZE as NEEDLE_VOCAB_SIZE
from ._prompts import Example as Example
from ._prompts import Task as Task
from ._tasks import MixedTask as MixedTask
from ._tasks import retrieval_tasks as retrieval_tasks
from ._tokenizers import ByteTokenizer as ByteTokenizer
from ._tokenizers import HuggingFaceTokenizer as HuggingFaceTokenizer
from ._tokenizers import Tokenizer as Tokenizer
from ._tokenizers import load_tokenizer as load_tokenizer
