"""The configuration of a run: frozen, typed, and described at each field.

The sentence under a field is its only description: the template (``pplr config --template``), error
messages and the reference page are made from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "AdapterConfig",
    "BackboneConfig",
    "ClientCutConfig",
    "Config",
    "CutConfig",
    "DataConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "FederationConfig",
    "HoldoutConfig",
    "ItemVectorsConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "PromptConfig",
    "RunConfig",
    "RuntimeConfig",
    "StatePrivacyConfig",
    "TrainingConfig",
    "UserPrivacyConfig",
]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class HoldoutConfig(_Section):
    """How each user's history is divided in time into train, validation and test."""

    kind: Literal["leave_one_out", "global_time", "user_ratio", "unseen_items", "new_users"] = "leave_one_out"
    """`leave_one_out`: each user's last item is the test target, the one before it the validation target.
    `global_time`: all interactions in order of time, cut at `ratios` (the paper's 8:1:1).
    `user_ratio`: each user's own history, cut at `ratios`. Ties in time keep the order of the input.
    `unseen_items`: a `share` of the items, drawn by the seed, is in no history, and each user's newest of them is the
    test target. `new_users`: of a `share` of the users the first item alone is known, and the second is the target."""

    ratios: tuple[float, float, float] = (8.0, 1.0, 1.0)
    """Shares of train, validation and test for `global_time` and `user_ratio`; only their proportion matters."""

    share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the items for `unseen_items`, of the users for `new_users`."""

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.ratios) < 0 or self.ratios[0] <= 0 or self.ratios[2] <= 0:
            raise ValueError(f"ratios must be positive for train and test, got {self.ratios}")
        return self


class PartitionConfig(_Section):
    """How users are shared out among clients."""

    by: Literal["kmeans", "column", "dirichlet", "random"] = "kmeans"
    """`kmeans`: clusters of collaborative-filtering user embeddings, from training interactions only (the paper's).
    `column`: a column of the users' data (occupation, region, shop), its values dealt to clients, largest first.
    `dirichlet`: users by favourite genre, genres shared out by a Dirichlet draw. `random`: even and random."""

    column: str | None = None
    """With `column`: the name of the users' column. With `dirichlet`: the items' column that holds genres."""

    concentration: float = Field(default=0.5, gt=0)
    """With `dirichlet`: the concentration; smaller makes clients more different."""

    factors: int = Field(default=32, ge=1)
    """With `kmeans`: width of the collaborative-filtering embeddings."""

    min_users: int = Field(default=5, ge=1)
    """Fewest users with a training sample that every client must have; fewer is an error."""


class DataConfig(_Section):
    """Which interactions, and how they are cleaned, held out and shared among clients."""

    source: str = "movielens-100k"
    """A registered source; `pplr data fetch --help` lists them. `table` reads any CSV or Parquet by `columns`."""

    path: Path | None = None
    """Folder or file of the source's raw data; when absent, the source is fetched into the cache."""

    columns: dict[str, str] = Field(default_factory=dict)
    """With `table`: from `user`, `item`, `title`, `rating`, `timestamp` to the names in the file.
    `user` and `item` are needed; others are used when present."""

    items_path: Path | None = None
    """With `table`: a second file with a row for each item (`item`, `title` and attributes by `columns`)."""

    catalog: Literal["taken", "all"] = "taken"
    """Which items can be recommended: those that somebody took, or `all` of the items' file. Clients that each hold
    their own users' data need `all`, with the same items' file, to have one catalog."""

    min_rating: float | None = None
    """Drop interactions rated below this; needs a rating column."""

    user_core: int = Field(default=1, ge=1)
    """Drop users with fewer interactions, again and again until both cores hold."""

    item_core: int = Field(default=1, ge=1)
    """Drop items with fewer interactions, again and again until both cores hold."""

    empty_titles: Literal["drop", "item_id"] = "item_id"
    """An item without a title is shown by its id (`item_id`), or dropped with its interactions (`drop`)."""

    holdout: HoldoutConfig = HoldoutConfig()
    """Train, validation and test."""

    partition: PartitionConfig = PartitionConfig()
    """Users to clients."""

    history_items: int = Field(default=10, ge=1)
    """Most items of a history that a prompt shows; the newest are kept."""


class PromptConfig(_Section):
    """The words around a history. Training and inference use the same bytes."""

    noun: str = "movies"
    """What items are called, in the plural."""

    verb: str = "watched"
    """What users did with them, as a past participle."""

    instruction: str = (
        "Given a list of {noun} the user has {verb} before, please recommend a new one that the user would like."
    )
    """The instruction; `{noun}` and `{verb}` are filled in."""

    targets: Literal["one", "all"] = "one"
    """`one`: a history and the one title that followed it (BIGRec's). `all`: a list with a title on each line, in which
    every title after the first is a target, so that one pass trains on all of a history. Recommending goes on with
    such a list. `data.history_items` is how long lists are."""


class ItemVectorsConfig(_Section):
    """With `item_vectors`: what a vector of an item is, and how states are matched with them."""

    attributes: tuple[str, ...] = ()
    """Columns of the items whose values are read after the title, such as genres."""

    pooling: Literal["mean", "last"] = "mean"
    """What stands for a text: the mean of the base model's states over its tokens, or the state of its last token."""

    whitening: Literal["none", "standardise", "zca"] = "zca"
    """How the base model's title vectors are prepared: as they are, each dimension standardised, or decorrelated."""

    width: int = Field(default=256, ge=1)
    """Width of the space in which states and items are compared."""

    hidden_width: int | None = Field(default=512, ge=1)
    """Width of the hidden layer that stands beside each projection of items; `null` leaves them linear. Titles that
    read alike may be liked by different users, which a linear map of their vectors tells apart less well."""

    temperature: float = Field(default=0.05, gt=0)
    """τ by which cosines are divided before the softmax over the catalog."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of what enters the first block that is dropped in training; `adapter.dropout` is LoRA's own."""

    negatives: int | None = Field(default=None, ge=1)
    """Items that a batch's targets are compared with, drawn anew for each batch; the whole catalog when absent."""

    secret_projection: bool = False
    """The projection that takes items into the first block never leaves the client, and starts from the client's own
    secret rather than from `run.seed`, so that a server has no copy of it to try items with."""

    residuals: Literal["none", "client", "mixed"] = "none"
    """A learned vector for each item besides its text, which carries interactions. `client`: it never leaves the
    client. `mixed`: it is exchanged like an adapter. Items that nobody took have none of use."""


class EncoderConfig(_Section):
    """With `encoder` (RecFormer): how an item is written, and how a history is matched with items."""

    attributes: tuple[str, ...] = ()
    """Columns of the items that follow the title as key and value, such as genres; at most two."""

    attribute_tokens: int = Field(default=32, ge=2)
    """Most tokens of one attribute, key and value together."""

    pooling: Literal["first", "mean"] = "first"
    """What stands for a text: the state of its first token (RecFormer's), or the mean over all of its tokens."""

    temperature: float = Field(default=0.05, gt=0)
    """τ by which cosines are divided before the softmax over the catalog."""

    negatives: int | None = Field(default=None, ge=1)
    """Items that a batch's targets are compared with, drawn anew for each batch; the whole catalog when absent."""

    first_phase_rounds: int | None = Field(default=None, ge=1)
    """Server rounds of the first phase, in which items are encoded anew before every epoch. Then each client goes
    back to its best round and keeps its item embeddings as they were (RecFormer's second phase). Absent: never."""

    @model_validator(mode="after")
    def _three(self) -> Self:
        if len(self.attributes) > 2:
            raise ValueError(f"an item has a title and at most two attributes, got {len(self.attributes)}")
        return self


class BackboneConfig(_Section):
    """The language model."""

    name: str = "causal_lm"
    """A registered backbone. `causal_lm`: a decoder writes the next title, which is grounded in the catalog.
    `item_vectors`: a decoder reads one vector for each item of a history, and every position predicts the next.
    `encoder`: RecFormer; an encoder reads a history as text, and is matched with the items it encodes."""

    model: str = "smollm2-135m"
    """A short name (`smollm2-135m`, `minilm-l6`), a hub id, a local folder, or a GGUF file."""

    revision: str | None = None
    """A hub revision (branch, tag or commit)."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the frozen base and of the arithmetic; adapters and optimizer stay float32."""

    device: str = "cpu"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`, ..."""

    keep_blocks: int | None = Field(default=None, ge=1)
    """Use the model's first blocks alone, which train faster; all when absent."""

    max_tokens: int = Field(default=512, ge=16)
    """Longest sequence that the model reads; the oldest items of a history give way, a title is never cut in two."""

    prompt: PromptConfig = PromptConfig()
    """The words around a history."""

    item_vectors: ItemVectorsConfig = ItemVectorsConfig()
    """Settings of `item_vectors`."""

    encoder: EncoderConfig = EncoderConfig()
    """Settings of `encoder`."""


class ClientCutConfig(_Section):
    """Where one client's model is divided."""

    input_layers: int = Field(default=2, ge=0)
    """k: blocks after the embeddings that stay on the client."""

    output_layers: int = Field(default=1, ge=0)
    """m: blocks before the norm and the head that stay on the client."""


class CutConfig(ClientCutConfig):
    """Where the model is divided: the client holds both ends, the server the middle."""

    by_client: dict[str, ClientCutConfig] = Field(default_factory=dict)
    """Clients whose cut is another, by name, such as `{"2": {input_layers: 4, output_layers: 2}}`. Adapters are mixed
    block by block, wherever a block is hosted."""


class AdapterConfig(_Section):
    """What is trained in the blocks."""

    kind: Literal["lora", "full"] = "lora"
    """`lora`: low-rank updates of some linear layers. `full`: every parameter of the blocks, as its difference from the
    frozen base; the fields below then say nothing. What is trained is what a federation exchanges."""

    rank: int = Field(default=8, ge=1)
    """R, the rank of every update."""

    lora_alpha: float = Field(default=16.0, gt=0)
    """LoRA's own alpha: updates are scaled by `lora_alpha / rank`. Not the paper's, which is `heating_scale`."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of LoRA's inputs dropped in training. Masks are drawn per block from the step's seed, so they do
    not depend on where the model is cut."""

    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    """Names of the linear layers in a block that get an adapter."""


class TrainingConfig(_Section):
    """Local training."""

    samples: int | None = Field(default=None, ge=1)
    """Training samples of all clients together, drawn once (the paper uses 1,024); all when absent. A sample is one
    target with its history, or where every title or item is a target, a list of up to `data.history_items` targets."""

    batch_size: int = Field(default=16, ge=1)
    """Samples for each optimizer step."""

    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples in memory at once; gradients add up over a batch. The whole batch when absent."""

    shared_prefix: bool = False
    """With `causal_lm`: put a batch's samples in one row of tokens without padding, in which the words before a history
    stand once. That is faster, and fewer bytes cross the cut. Losses and gradients are the same without dropout; with
    it, what is shared is dropped once for all samples of the batch."""

    recompute: bool = False
    """Run blocks again in the backward pass rather than keep their activations: slower, smaller, the same bits. It is
    of all blocks in this process; a stage server decides for itself (`pplr stage serve --recompute`)."""

    local_epochs: int = Field(default=1, ge=1)
    """Passes over a client's own samples in each server round."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW's peak rate."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""

    warmup_steps: int = Field(default=20, ge=0)
    """Optimizer steps until the peak rate; at most half of all steps."""

    ends_rate: float = Field(default=1.0, gt=0)
    """What is trained outside the blocks (projections of `item_vectors`) learns at this many times the rate."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: `linear` and `cosine` fall to zero over all server rounds, `constant` stays."""

    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm, taken over all stages together."""

    optimizer_state: Literal["carry", "reset"] = "carry"
    """Whether AdamW's moments and the schedule go on from one server round to the next."""


class FederationConfig(_Section):
    """Who trains with whom."""

    method: str = "pplr"
    """`pplr`, `pplr_weighted` (clients count by their samples; not the paper's), `fedavg`, `fedprox`, `ditto`, `local`
    (no exchange) or `centralized` (all data pooled)."""

    clients: int = Field(default=5, ge=1)
    """Number of clients."""

    rounds: int = Field(default=5, ge=1)
    """Most server rounds."""

    patience: int | None = Field(default=5, ge=1)
    """Stop when no client has improved on its best round for this many server rounds; never when absent."""

    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the clients that train in each server round."""

    similarity: Literal["adapters", "updates", "products", "none"] = "adapters"
    """What the cosine compares: the adapters (the paper's), what training changed in them, or the products BA;
    `none` takes all clients for equally similar."""

    temperature: float = Field(default=0.05, gt=0)
    """τ of the softmax that shares the loss out among clients."""

    heating_scale: float | None = Field(default=0.7, gt=0)
    """The paper's α, which sets how warm a client starts; absent turns heating off (w = 1)."""

    heating_horizon: float = Field(default=5.0, gt=0)
    """The paper's β, which sets how fast clients open to the others."""

    weighting: Literal["samples", "uniform"] = "samples"
    """How `fedavg`, `fedprox` and `ditto` weigh clients: by their training samples, or all the same."""

    averaging: Literal["factors", "freeze_a", "product"] = "factors"
    """How LoRA is mixed: A and B apart (the paper's), B alone with A kept at its start, or the products BA
    exactly, then cut back to the rank by a singular value decomposition."""

    proximal_mu: float = Field(default=0.01, ge=0)
    """Strength of the pull towards the server's adapter in `fedprox` and `ditto`."""

    fewest: int = Field(default=2, ge=1)
    """Fewest updates that make a round, where clients can be lost; all participants' where there are fewer."""

    norm_factor: float = Field(default=100.0, gt=1)
    """An update is refused whose norm is more than this many times the median of its round. Applies where clients
    run elsewhere; among fewer than three updates none is refused for its size."""


class UserPrivacyConfig(_Section):
    """User-level differential privacy of local training; docs/dp.md says what its ε covers and what it does not."""

    noise_multiplier: float | None = Field(default=None, gt=0)
    """σ: standard deviation of the noise, in units of `clip_norm`. Absent, training is not private, and the fields
    below say nothing."""

    clip_norm: float = Field(default=1.0, gt=0)
    """C: the most that one user can add to a step, as the norm of that user's gradient over all that is trained."""

    sampling_rate: float = Field(default=0.1, gt=0, le=1)
    """q: with this probability a user takes part in a step, each drawn alone. A local epoch has 1/q steps, and
    `training.batch_size` is how many samples of one user are in memory at once."""

    users_per_step: float = Field(default=16.0, gt=0)
    """What the noisy sum of a step is divided by: about q times the users of a client. It is public, and the true
    number is not, so it is not computed from them."""

    delta: float = Field(default=1e-5, gt=0, lt=1)
    """δ at which ε is told; choose it well below one over the users of a client."""

    epsilon_budget: float | None = Field(default=None, gt=0)
    """No round is trained that would bring a client's ε above this; never a stop when absent."""

    freeze_middle: bool = False
    """Leave the adapter of the middle blocks at its start. A stage server elsewhere needs it, as a user's gradient is
    clipped over all stages at once."""

    @property
    def is_on(self) -> bool:
        """Whether training is private."""
        return self.noise_multiplier is not None


class StatePrivacyConfig(_Section):
    """What a client does to what it sends across the cut; docs/privacy.md says what each setting is worth."""

    clip_norm: float | None = Field(default=None, gt=0)
    """C: the most that one token's hidden state may measure at the first cut; longer ones are scaled down to it."""

    noise: Literal["none", "gaussian", "metric", "learned"] = "none"
    """Added to every hidden state at the first cut. `gaussian`: normal noise of `noise_multiplier` times `clip_norm`.
    `metric`: noise of density proportional to exp(-`eta` times its length), which hides near states from each other.
    `learned`: a state becomes a code of `code_width` numbers with normal noise, code and noise being trained to tell
    little besides what ranking needs; no ε; for `item_vectors`."""

    noise_multiplier: float | None = Field(default=None, gt=0)
    """With `gaussian`: the noise's standard deviation in each dimension, in units of `clip_norm`."""

    eta: float | None = Field(default=None, gt=0)
    """With `metric`: η, by which two states at a distance of 1 may be told apart; smaller hides more. The noise is
    about D/η long, D being the model's width."""

    code_width: int | None = Field(default=None, ge=1)
    """With `learned`: r, numbers of a code. What crosses is as wide as before, and a linear map of the code."""

    rate_weight: float | None = Field(default=None, gt=0)
    """With `learned`: β, the weight in training of an upper bound on what each state tells, in nats, beside the loss
    of its target; more tells less, and ranks worse."""

    settle_rounds: int | None = Field(default=None, ge=0)
    """After how many server rounds the input stage is trained no further and drops nothing, so that a history that
    crosses again crosses as the same bytes, noise included, and passes cannot be averaged; never when absent. With 0
    it keeps what it started from. For `item_vectors`."""

    gradient_clip_norm: float | None = Field(default=None, gt=0)
    """The most that a token's gradient may measure at the second cut, for the loss summed over a batch's targets."""

    gradient_noise_multiplier: float | None = Field(default=None, gt=0)
    """Standard deviation of normal noise on those gradients, in units of `gradient_clip_norm`; none when absent.
    Without it a server reads the targets, whatever is done to the states."""

    delta: float = Field(default=1e-5, gt=0, lt=1)
    """δ at which ε of normal noise is told."""

    @property
    def is_on(self) -> bool:
        """Whether anything is done."""
        return self.clip_norm is not None or self.noise != "none" or self.gradient_clip_norm is not None

    @property
    def is_noisy(self) -> bool:
        """Whether anything is drawn."""
        return self.noise != "none" or self.gradient_noise_multiplier is not None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.noise == "gaussian" and (self.noise_multiplier is None or self.clip_norm is None):
            raise ValueError("noise: gaussian needs noise_multiplier and clip_norm: without a bound it gives no ε")
        if self.noise == "metric" and self.eta is None:
            raise ValueError("noise: metric needs eta")
        if self.noise != "gaussian" and self.noise_multiplier is not None:
            raise ValueError("noise_multiplier goes with noise: gaussian alone")
        if self.noise != "metric" and self.eta is not None:
            raise ValueError("eta goes with noise: metric alone")
        if self.noise == "learned" and (self.code_width is None or self.rate_weight is None):
            raise ValueError("noise: learned needs code_width and rate_weight")
        if self.noise != "learned" and (self.code_width is not None or self.rate_weight is not None):
            raise ValueError("code_width and rate_weight go with noise: learned alone")
        if self.noise == "learned" and self.clip_norm is not None:
            raise ValueError("clip_norm does not go with noise: learned: the rate is what bounds a code")
        if self.settle_rounds is not None and self.noise == "none":
            raise ValueError("settle_rounds keeps noise the same, and there is none: set noise")
        if self.noise == "learned" and self.settle_rounds == 0:
            raise ValueError("settle_rounds: 0 leaves noise: learned untrained: give it a round at least")
        if self.gradient_noise_multiplier is not None and self.gradient_clip_norm is None:
            raise ValueError("gradient_noise_multiplier needs gradient_clip_norm")
        return self


class PrivacyConfig(_Section):
    """What guards the users."""

    dp: UserPrivacyConfig = UserPrivacyConfig()
    """User-level differential privacy."""

    states: StatePrivacyConfig = StatePrivacyConfig()
    """Clipping of and noise on what crosses the cut."""


class EvaluationConfig(_Section):
    """How rankings are made and measured."""

    grounding: Literal["l2", "trie"] = "l2"
    """`l2`: the generated text goes to the nearest titles by the base model's embeddings (BIGRec's).
    `trie`: the beams walk a trie of the catalog's titles, so that only real items come out."""

    beams: int = Field(default=4, ge=1)
    """Width of the beam search."""

    max_new_tokens: int = Field(default=32, ge=1)
    """Longest generated title, in tokens."""

    batch_size: int = Field(default=16, ge=1)
    """Users generated for at once."""

    cutoffs: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(10, 20), min_length=1)
    """The K of Recall@K, NDCG@K and Hit@K."""

    test_users: int | None = Field(default=None, ge=1)
    """Most users tested, drawn once in proportion to the clients; all when absent."""

    validation_users: int | None = Field(default=None, ge=1)
    """Most users for each client's validation, drawn once; all when absent."""

    validation_metric: str = "loss"
    """What picks a client's best round: `loss` on the validation targets (fast), or a ranking metric such as
    `ndcg@10` (generates for every validation user in every round)."""

    before: bool = False
    """Test the initial adapter as well, for a table before and after training."""

    floors: tuple[str, ...] = ("popularity",)
    """Models without a language model, tested on the same users: `popularity`, `item_knn`, `als`."""


class RuntimeConfig(_Section):
    """Where it runs."""

    name: Literal["in_process", "flower_simulation", "flower"] = "in_process"
    """`in_process`: all clients and the server in this process, the reference. `flower_simulation`: clients are
    actors of Flower's Ray engine on this machine or a Ray cluster (`pip install 'pplr[flower]'`). `flower`: clients
    are on their own machines (`pplr server`, `pplr client`), and `pplr train` needs --federation and --state."""

    deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds that Flower waits for the reports of a round; a client that has not answered is left out of it."""

    attempts: int = Field(default=3, ge=1)
    """How often a round is ordered anew when fewer than `federation.fewest` clients answer, before the run ends."""

    client_cpus: float = Field(default=1.0, gt=0)
    """Processors that `flower_simulation` gives to each client that trains; so many train at once as fit."""

    client_gpus: float = Field(default=0.0, ge=0)
    """GPUs that `flower_simulation` gives to each client that trains; a share of one lets several use it."""

    threads: int | None = Field(default=None, ge=1)
    """Compute threads; the machine's cores when absent. Results are bitwise repeatable for one number of threads."""

    wire: Literal["exact", "float32", "bfloat16", "int8"] = "exact"
    """How hidden states and gradients travel to a stage server. `exact` keeps every bit of `backbone.dtype`;
    `bfloat16` and `int8` (with a scale for each token) round. Without a stage server nothing travels."""

    in_flight: int = Field(default=1, ge=1, le=4)
    """Micro-batches (`training.micro_batch_size`) under way at once, so that client and stage server compute at the
    same time, to the same bits; each keeps its activations. Without a stage server they come one after another."""


class RunConfig(_Section):
    """The run itself."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Every draw follows from it."""

    keep_rounds: bool = False
    """Keep every round's adapters of every client, before and after mixing."""

    checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints to keep."""

    trackers: tuple[str, ...] = ()
    """Where curves go besides `rounds.jsonl`: `tensorboard`, `mlflow` (`pip install 'pplr[tensorboard,mlflow]'`)."""


class Config(_Section):
    """A whole run."""

    data: DataConfig = DataConfig()
    """The data."""
    backbone: BackboneConfig = BackboneConfig()
    """The model."""
    cut: CutConfig | None = CutConfig()
    """Where it is cut; `null` trains the uncut model."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained."""
    training: TrainingConfig = TrainingConfig()
    """Local training."""
    federation: FederationConfig = FederationConfig()
    """The method."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Rankings and metrics."""
    privacy: PrivacyConfig = PrivacyConfig()
    """What guards the users."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where it runs."""
    run: RunConfig = RunConfig()
    """The run itself."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.adapter.kind == "full" and self.training.recompute:
            raise ValueError("training.recompute goes with adapter.kind: lora alone")
        if self.training.shared_prefix and self.backbone.name in ("item_vectors", "encoder"):
            raise ValueError(f"training.shared_prefix goes with prompts, which {self.backbone.name} has none of")
        if self.training.shared_prefix and self.privacy.states.is_on:
            raise ValueError(
                "training.shared_prefix does not go with privacy.states: its promise is of a user's own states and "
                "gradients, and what is shared has one gradient of several users"
            )
        if self.privacy.states.is_on and self.cut is None:
            raise ValueError("privacy.states needs a cut: of a model that is not cut nothing crosses")
        states = self.privacy.states
        if self.backbone.name != "item_vectors" and (states.noise == "learned" or states.settle_rounds is not None):
            raise ValueError(
                "privacy.states.noise: learned and settle_rounds go with backbone.name: item_vectors, "
                f"not with {self.backbone.name}"
            )
        if states.noise == "learned" and self.runtime.in_flight > 1:
            raise ValueError("privacy.states.noise: learned needs runtime.in_flight: 1")
        return self

    def to_yaml(self) -> str:
        """Write every field, resolved, as YAML that :func:`pplr.load_config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
