"""The sections of a spec beside `training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.spec.base import Float, Int, JsonText, Names, Spec
from service.spec.text import TextRules


class DataConfig(Spec):
    """How audio reaches the model."""

    dataset: str | None = Field(default=None, min_length=1, examples=["mozilla-foundation/common_voice_17_0"])
    """Clips from a dataset in place of `training.train_csv` and `training.val_csv`: a hub id, or a folder that
    `datasets` has saved or that holds its Parquet files. Its splits are joined and split anew, as `whisper-jobs
    manifest build` does, and rows that cannot be used are left out and listed."""

    dataset_config: str | None = Field(default=None, min_length=1, examples=["nl"])
    """Name of the dataset's configuration."""

    text_column: str | None = Field(default=None, min_length=1, examples=["sentence"])
    """Column of the dataset that holds the transcripts. Default: `text`, `sentence`, `transcript`, `transcription` or
    `normalized_text`."""

    group: str | None = Field(default=None, min_length=1, examples=["speaker_id"])
    """Column of the dataset of whose values none is both trained on and scored on."""

    val_ratio: Float = Field(default=0.1, gt=0, lt=1)
    """Share of the dataset that is held out."""

    bad_rows: Literal["error", "reject"] = "error"
    """What to do with rows that cannot be used (no such file, unreadable, over 30 s, no text, too many tokens): `error`
    ends the job before it trains and lists them all; `reject` leaves them out and lists them in rejects.csv."""

    check: Literal["header", "decode"] = "decode"
    """How the job looks at audio before it trains: `decode` reads all of it, so that nothing broken ends a training
    hours later; `header` opens every file and compares its length with its header's and its row's, which is enough for
    what `whisper-jobs manifest build` or `check` has decoded just before."""

    min_duration_s: Float = Field(default=0.1, ge=0, lt=30)
    """Shortest clip, in seconds."""

    silence_dbfs: Float = Field(default=-60.0, le=0)
    """A decoded clip whose loudness (RMS, in dB below full scale) is under this counts as silent, unless its row is
    marked as `no_speech`."""

    clipped_share: Float = Field(default=0.01, gt=0, le=1)
    """A decoded clip counts as clipped where more than this share of its samples is at full scale."""

    text: Annotated[TextRules | None, JsonText] = Field(default=None, examples=[{"case": "lower"}])
    """Rules that put transcripts into one form, applied alike to what is trained on, to references and to what a model
    heard: an object with any of `unicode` (keep, NFC, NFKC), `quotes` (keep, plain), `brackets` (keep, remove),
    `replace` (a list of {"pattern", "by"}), `punctuation` (keep, remove) and `case` (keep, lower, upper), also as a
    JSON string. Default (null): texts stay as they are."""

    timestamps: Float = Field(default=0.5, ge=0, le=1)
    """Share of the rows with segments that are trained with timestamp tokens, drawn anew in each epoch. Rows without
    segments are trained without, unless they share a window (`packing`): then this is the share of such windows, in
    which each utterance's begin and end are known."""

    packing: bool = False
    """Join training utterances of one language, and of one speaker where the manifest names them (a column `speaker`,
    `speaker_id`, `client_id`, `spk` or `group`), in windows of 30 s, drawn anew in each epoch: one pass of the encoder
    hears several, and the model learns transcripts as long as a window. Each utterance is in one window per epoch.
    `per_dev_batch` goes on counting utterances, so that steps, schedule and epochs stay as they are; as a window never
    goes beyond a forward pass, `per_dev_batch` should be several times as many as a window holds, with `grad_accum`
    lowered in turn. `augment` varies each utterance by itself and masks the window. Rows of `no_speech` stay alone, and
    what is scored is never joined. Encoder outputs of training clips are not kept (`engine.keep_encoder`)."""

    packing_single: Float = Field(default=0.05, ge=0, lt=1)
    """With `packing`: share of the utterances that stay alone in a window, drawn anew in each epoch, so that short
    clips are still learned. Of clips of 5 s, six to a window, 0.05 of the utterances are 0.24 of the windows."""

    packing_gap_s: Float = Field(default=0.2, ge=0, le=5)
    """With `packing`: silence between two utterances of a window, in seconds."""

    keep_audio_gb: Float | None = Field(default=None, ge=0, examples=[20])
    """Most that decoded clips may take of each worker's main memory, in GB. A clip that is heard again, in a later
    epoch or evaluation, is then not decoded and resampled again; what has no room is. A second takes 64 kB. 0: nothing
    is kept. Default: a quarter of what is free of the node's, as long as half of that stays free. Clips whose encoder
    outputs are kept (`engine.keep_encoder`) are not kept decoded."""

    prefetch: Int = Field(default=4, ge=1)
    """Micro-batches that are decoded ahead of the model, per worker."""

    threads: Int = Field(default=2, ge=1)
    """Threads per worker that decode, resample and compute log-mel features."""


class EngineConfig(Spec):
    """How training steps are made; defaults that few need to touch."""

    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warm-up: `linear` falls in a line to 0 at the end of the training,
    `cosine` falls in half a cosine wave to 0, `constant` stays at its peak."""

    max_grad_norm: Float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm where theirs is larger."""

    weight_decay: Float = Field(default=0.0, ge=0)
    """Weight decay of AdamW on the trained parameters."""

    base_dtype: Literal["auto", "float32"] = "auto"
    """How the frozen base lies in memory while it is trained on. `auto`: in mixed precision the matrices of its linear
    layers and convolutions are held in that precision, and not cast anew in each forward pass; what is multiplied is
    the same to the bit. Embeddings, the output head, layer norms and weights under DoRA stay in float32, and so does
    all with a `lora_init` that changes the base or looks at data, and in trials that train together. `float32`: all of
    it in float32, as PEFT has it."""

    fast_features: bool = True
    """Make log-mel features on the device that the model is on, of the samples that a clip has; the frames of the
    silence behind it follow from the loudest one. On the CPU they are those of transformers' extractor to the bit, on a
    GPU they differ by rounding. False: transformers' extractor, which transforms the whole window, on the CPU."""

    fast_loss: bool = True
    """Compute the loss and its gradient straight from the decoder's output, only where there is a label, some rows at
    a time or, in float32 on a CPU, in one kernel: logits over the whole vocabulary, the largest thing that the decoder
    makes, are not kept. False: as transformers does, and so too where the output head has an adapter. The results
    differ by rounding."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    fast_lora: bool = True
    """Compute LoRA with its scale s taken to B, and the low-rank product added where that of the base lies,
    y = W x + b and y += (s B) A d(x), in the backward pass likewise. False: PEFT's own layers, which write four tensors
    as large as the output, where this writes one. The results differ by rounding."""

    fast_dora: bool = True
    """Compute DoRA at LoRA's cost: the norms n of the rows of W + s B A once per optimizer step, in float32, from
    ||W||^2 + 2 s B . (W A^T) + s^2 B . (B A A^T), and each layer as y = g * (W x + s B A x) + b with g = m / n. False:
    PEFT's own layers, which compute the norms anew from all of W + s B A in every forward pass, in training and for
    every token in transcribing. The results differ by rounding."""

    dora_dropout: Literal["branch", "peft"] = "branch"
    """What `lora_dropout` drops with DoRA in training, d(x) being x with elements dropped: `branch` the input of the
    low-rank branch, as LoRA does, y = g * (W x + s B A d(x)) + b; `peft` what PEFT drops, the input of a base product
    too, y = W x + b + (g - 1) * W d(x) + g * s B A d(x), which `fast_dora` cannot speed up. The two are the same at a
    dropout of 0, and in evaluation always."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""

    keep_encoder: Literal["auto", "device", "host", "disk", "off"] = "auto"
    """With `training.freeze_encoder`, the encoder's output for a clip that `augment` does not vary is the same in every
    epoch and evaluation: it is computed once and kept, and the clip is not decoded again. `auto`: where a clip is heard
    more than once, in the GPU's memory, then in main memory, then in 16 GB at most of the disk of $WHISPER_JOBS_CACHE,
    for each worker; `device`, `host`, `disk`: there alone. What has no room is computed anew. A window takes 3.84 MB in
    mixed precision at a width of 1280, and twice as much without. `off`: the encoder runs each time, as in
    transformers."""

    keep_encoder_gb: Float | None = Field(default=None, ge=0, examples=[20])
    """Most that kept encoder outputs (`keep_encoder`) may take of each worker's GPU memory, and of main memory, in GB.
    Default: half of what training leaves of the GPU's, and a quarter of what is free of the node's."""

    init_clips: Int = Field(default=64, ge=1)
    """Clips of the training set that `lora_init` eva, corda and lora_ga look at before the training, unvaried and in
    float32. The first ones in the order of the first epoch."""

    keep_checkpoints: Int = Field(default=2, ge=1)
    """How many of the last checkpoints are kept. Each carries the best adapter by WER so far, so that one is never
    lost."""

    report_to: Names = Field(default=["tensorboard"])
    """Experiment trackers that get the training curves, by accelerate's names (`tensorboard`, `wandb`, `mlflow`, ...).
    An empty list: none. events.jsonl is always written."""

    threads: Int | None = Field(default=None, ge=1, examples=[8])
    """CPU threads of torch in each worker. Default: the worker's CPUs."""

    timeout_s: Float = Field(default=1800, ge=1)
    """How long, in seconds, workers wait for one that does not answer, and the job for a sign of life of its training,
    before the run ends as hung. More than the longest transcription of a batch and the longest saving of a
    checkpoint."""


class EvaluationConfig(Spec):
    """How a model is scored, in training and on its own."""

    model: str | None = Field(default=None, min_length=1, examples=["openai/whisper-small"])
    """For `kind: evaluate`: what to score. A hub id, a folder with a checkpoint, a PEFT adapter, or the root of a
    run."""

    csv: str | None = Field(default=None, min_length=1, examples=["data/test.csv"])
    """For `kind: evaluate`: the CSV to score it on, in the form of `training.val_csv`."""

    metric: Literal["wer", "loss"] = "wer"
    """What evaluations in training measure on the validation set, and so what the best checkpoint and a search's winner
    are chosen by: `wer`, by generation, or `loss`, per label token, which takes a fraction of the time and says less.
    The base model and the result are scored by their WER in any case."""

    batch_size: Int = Field(default=64, ge=1)
    """Clips that are transcribed at once, per worker. They are sorted by length first; where memory is short, a batch
    is decoded in halves."""

    fast_decoding: bool = True
    """Transcribe greedily by a decoder of our own: keys and values in memory that is allocated once, rows that have
    ended let go, adapters folded into weights (W + s B A, made in float32) while a model is scored. Its texts are those
    of transformers' generate(), but for logits that are equal to rounding. False: generate(), with adapters as they
    are; so it is, too, with beams, and where the checkpoint's generation config asks for more than suppressed tokens,
    such as a repetition penalty."""

    num_beams: Int = Field(default=1, ge=1)
    """Beams of the decoder; 1 is greedy."""

    max_new_tokens: Int = Field(default=225, ge=1, le=444)
    """Longest transcript, in tokens."""

    normalizer: Literal["keep_marks", "whisper"] = "keep_marks"
    """What texts go through before words and characters are counted; rates called `raw` are of texts as they are.
    English: Whisper's English normaliser. Other languages: its basic one, which lowers case and takes out punctuation
    and what stands in brackets. `whisper`: as published, which also puts a space in place of every combining mark.
    Marks are the vowels of Hindi, Bengali, Tamil, Thai and other scripts: errors in them are not seen then, and a word
    becomes several. `keep_marks`: they stay. Languages written without marks have the same rates by both."""

    bootstrap: Int = Field(default=1000, ge=0)
    """Resamples of the utterances behind the 95 % interval of the WER; 0 leaves the interval out."""


class ResourcesConfig(Spec):
    """What the job asks of the Ray cluster."""

    workers: Int = Field(default=1, ge=0)
    """Training workers (processes), one model copy each. 0: train inside the job's own process, for debugging."""

    min_workers: Int | None = Field(default=None, ge=1, examples=[1])
    """Elastic training: the fewest workers to go on with. Where there is room for fewer than `workers`, at the start or
    after a node was lost, the job waits a tenth of `wait_s` for all of them and then takes what there is; when room for
    all has come, it takes it, from a checkpoint. Each worker does the work of several then: batches and dropout stay as
    they are, and the result differs by rounding alone. Default (null): `workers`, always."""

    gpus_per_worker: Float | None = Field(default=None, ge=0, examples=[1])
    """GPUs of each worker. Default: 1 where the cluster has GPUs, else 0."""

    cpus_per_worker: Float = Field(default=1, gt=0)
    """CPUs of each worker."""

    wait_s: Float = Field(default=300, ge=0)
    """How long to wait, in seconds, for a cluster that cannot hold the job yet: an autoscaler may add nodes, other jobs
    may end, a node that was lost may be replaced."""

    max_failures: Int = Field(default=3, ge=0)
    """How often the training goes on by itself, from its last checkpoint, after a worker process has died. What would
    fail again in the same way (bad input, a full disk, too little memory) ends the job at once. A node that is taken
    away with notice (drained, preempted, SIGTERM) does not count."""


class StorageConfig(Spec):
    """Where results go. Addresses and credentials come from the environment, never from a spec."""

    uri: str = Field(default="./runs", min_length=1)
    """Folder, or URI of object storage (s3://bucket/folder, gs://bucket/folder), under which each run gets its root,
    `<uri>/<job id>`, unless `training.outdir` names the root itself."""
