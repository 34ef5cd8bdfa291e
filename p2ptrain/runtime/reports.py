"""What a peer is asked and what it reports: requests, progress events and results.

These objects are the public API's data and, through `to_plain`, the control socket's and the
`--json` output's. REPORT_VERSION changes when a field changes its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from p2ptrain.ids import DeviceId, RunId
from p2ptrain.schedule.actions import AUTO
from p2ptrain.training.contract import OptimizerChoice

REPORT_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """One training job, asked of the peer that owns the data (the home peer)."""

    bundle: str
    """Directory of the bundle; empty when resuming."""
    data: str
    """File or folder to train on; empty when resuming, or where peers feed their own."""
    heldout: str | None = None
    """File or folder to evaluate on; None: 5 % of the data, its end where it is one text."""
    text_field: str | None = None
    """JSONL field or CSV column of the text; None: `text`, or `words` for tagged words."""
    label_field: str | None = None
    """JSONL field or CSV column of the label; None: `label`, or `tags` for tagged words."""
    labels: str | None = None
    """`.npy` file of labels, where the data is one `.npy` array."""
    heldout_labels: str | None = None
    """The same for the held-out array."""
    steps: int = 100
    stages: int | None = None
    """Exact number of stages; None: the planner chooses."""
    plan: str | None = None
    """Text of a file with the plan to begin with (`planner.plan_file`); None: the planner finds
    one."""
    objective: str = "time"
    """What plans minimise: time, or energy of all peers that take part."""
    deadline_s: float | None = None
    """Seconds that all steps may take; None: any."""
    joules: float | None = None
    """Joules that all steps may take; None: any."""
    parallelism: str = "pipeline"
    """Which plans the run may have: pipeline (the bits of one peer), auto, data, tensor, sequence
    or hybrid."""
    microbatches: int = 8
    microbatch_size: int | None = 4
    """Samples in each; None: the planner divides the minibatch, which then has as many samples as
    with microbatches of 4."""
    seed: int = 0
    threads: int | None = None
    """Intra-op threads per peer; None: half of the cores of the smallest peer."""
    form: str = "portable"
    codec: str = "fp32"
    """Of boundary tensors between peers: fp32, bf16 or int8; auto: the planner chooses."""
    schedule: str = AUTO
    """1f1b, gpipe, zb-h1, eager-1f1b or eager-zb-h1; auto: the shortest step but for gpipe's."""
    dropout: float | None = None
    rematerialise: bool | None = False
    """Keep each segment's inputs only, and run its forward again for the backward; None: where the
    planner finds a plan for it only, or a better one."""
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)
    evaluate_every: int = 0
    heldout_microbatches: int = 8
    checkpoint_every: int = 100
    replicate_every: int | None = None
    """Steps between replica sets; None: the planner chooses."""
    keep_data_here: bool = False
    """The data gets no second copy: while this peer is away the run pauses."""
    private: bool = False
    """Neither inputs nor labels leave this peer: it has the first and the last stage."""
    own_data: bool = False
    """Every peer that gives data feeds its own, as one of several replicas of the model."""
    force_view: bool = False
    """Resume although the run may be going on elsewhere: begins a new lineage."""
    resume: str | None = None
    """A run id (or its unambiguous beginning) of this device."""
    out: str | None = None
    """Where to write trained.onnx; None: into the run's directory."""
    safetensors: str | None = None
    """Where to write the trained tensors by their own names as well; None: nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """One line of the printed plan: a device's part of a stage."""

    device: DeviceId
    name: str
    stage: int
    first_segment: int
    last_segment: int
    segments: tuple[str, ...]
    parameters: int
    memory_bytes: int
    share: float
    """Expected share of the step's compute, 0 to 1."""
    split: str = "none"
    """How several devices share the stage: replicas, tensor or sequence."""
    part: float = 1.0
    """Of its microbatches, heads and columns, or positions that this device has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerReport:
    """Whose own data a run trains on, and how much of each step it is."""

    device: DeviceId
    name: str
    records: int
    """To train on."""
    unit: str
    """What is counted: records, or tokens or bytes of text."""
    microbatches: int
    """Of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """The agreed plan as a person reads it. Event name: `plan`."""

    run: RunId
    bundle: str
    plan: str
    view: int
    schedule: str
    stages: tuple[StageReport, ...]
    predicted_step_s: float
    exactness: str
    reasons: tuple[str, ...]
    predicted_boundary_bytes: int = 0
    """Activations and cotangents that a step sends between peers, without framing."""
    predicted_step_joules: float | None = None
    """Of all peers with a stage, idle time included; None: not all say what they draw."""
    owners: tuple[OwnerReport, ...] = ()
    """Where peers feed their own data; empty: one device feeds all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionReport:
    """What the present view's plan predicted for a step, beside what its steps took."""

    predicted_step_s: float
    measured_step_s: float | None
    """Median of this view's latest steps; None: not one was timed here."""
    predicted_boundary_bytes: int
    """Activations and cotangents between peers, without framing."""
    measured_boundary_bytes: float | None
    """A step's mean at the sockets, encrypted and framed; None: not known, or the view changed."""
    timed_steps: int
    predicted_step_joules: float | None = None
    """Of all peers with a stage, idle time included; None: not all say what they draw."""
    measured_step_joules: float | None = None
    """A step's mean of the session as the peers' meters or models have it; None: the view changed,
    or not everybody has told yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Progress after one step. Event name: `step`."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    samples_per_s: float
    joules_per_sample: float | None
    activities: dict[str, str]
    """Device name -> what it is doing, one phrase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """A held-out evaluation. Event name: `evaluation`."""

    step: int
    heldout_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteReport:
    """Something a person should know while it runs. Event name: `note`."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnergy:
    """Joules of one phase: marginal is above idle, total includes the idle share."""

    seconds: float
    marginal_joules: float
    total_joules: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEnergy:
    """One peer's energy, split into phases that add up to its total."""

    device: DeviceId
    name: str
    phases: dict[str, PhaseEnergy]
    """compute, communicate, wait, idle."""
    marginal_joules: float
    total_joules: float
    scope: str
    """wall, board, soc, package or model."""
    quality: str
    """measured or estimated."""
    error_band: float | None
    """Relative half width of the error band; None when unknown."""
    meter: str
    """Identity of the meter: peers that share one are counted once."""
    source: str
    """Where the figure comes from, one phrase."""
    bytes_sent: int
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReport:
    """Energy of a run or of a peer's life; meters shared by several peers are counted once."""

    peers: tuple[PeerEnergy, ...]
    marginal_joules: float
    total_joules: float
    joules_per_sample: float | None
    predicted_joules_per_sample: float | None = None
    """Of the run's last plan; None: of no run, or not all peers say what they draw."""
    version: int = REPORT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficReport:
    """What one peer sent another for one kind of a run's traffic."""

    sender: DeviceId
    receiver: DeviceId
    kind: str
    """A kind of tensor (activation, cotangent, input, labels, release, tied), evaluation, state,
    log, data, weights, bundle or control."""
    bytes_sent: int
    """Encrypted, at the socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The end of a run."""

    run: RunId
    bundle: str
    peers: int
    stages: int
    first_step: int
    """Steps that were already done when this session of the run began."""
    steps: int
    losses: tuple[float, ...]
    """One per step of this session."""
    heldout_first: float
    heldout_last: float
    seconds: float
    samples_per_s: float
    tokens_per_s: float
    bytes_sent: int
    """Encrypted bytes sent by all peers during this run."""
    traffic: tuple[TrafficReport, ...]
    """What of them belongs to the run, by link and kind; as far as every peer has reported."""
    energy: EnergyReport
    state_digest: str
    """sha256 over parameters and optimizer state, manifest order."""
    model_path: str | None
    stopped: bool
    """Ended before its last step on request; resume to go on."""
    prediction: PredictionReport | None = None
    """Of the last view."""
    owners: tuple[OwnerReport, ...] = ()
    """Whose own data it was trained on; empty: one device fed all."""
    version: int = REPORT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """One line of `status`."""

    device: DeviceId
    name: str
    state: str
    """self, alive, suspect, dead or left, with the reason when it is not alive and linked."""
    addresses: tuple[str, ...]
    runtime: str
    activity: str
    last_heard_s: float | None
    state_s: float | None = None
    """Seconds in this state; None for this device itself."""
    round_trip_s: float | None = None
    """Between a ping and its answer; None: not measured."""
    linked: bool = True
    """Whether this device has a link with it."""
    last_down: str = ""
    """Why it was down the last time; empty when it never was."""
    bytes_per_s: int | None = None
    """What we could send it, measured while more waited than the link carries; None: not
    measured, and planned with an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What the last loss cost a run in time, as one member saw it; all but one are durations."""

    reason: str
    noticed_at_s: float
    """Seconds since the epoch, by this device's clock."""
    agreement_s: float
    """From noticing to the decision of the next view."""
    transfer_s: float
    """Of the restoration: waiting for states and logs from others, here."""
    replay_s: float
    """Of the restoration: computing steps again, here."""
    ready_s: float
    """From the decision until every member was ready; transfer and replay are in it."""
    step_s: float
    """From then to the first new committed step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatusReport:
    """Where the run of this peer stands, as this peer sees it."""

    run: RunId
    lineage: int
    view: int
    """0: the first plan is being agreed or begun."""
    members: tuple[str, ...]
    """Names, with what each does in this view."""
    step: int
    """The newest committed step; nothing can undo it while one device at most is lost."""
    steps: int
    safety: str
    """`protected`, or `provisional` and why: a further loss may cost the newest steps."""
    waits_for: str | None
    """Why nothing moves right now, and what to do; None while it does."""
    replica_step: int | None
    """The newest step of which every stage has a whole replica elsewhere."""
    replica_every: int
    log_steps: int
    log_bytes: int
    log_bytes_max: int
    replica_bytes: int
    """Replicas that this device keeps for others."""
    data_holders: tuple[str, ...]
    """Names of the members that have the run's data; where each feeds its own, of all owners."""
    last_recovery: RecoveryReport | None = None
    prediction: PredictionReport | None = None
    """Where this device feeds the run; None elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """What `p2ptrain status` shows."""

    group: str
    group_name: str
    device: DeviceId
    name: str
    address: str
    discovery: str
    """How others are found, or why discovery does not work."""
    alone_because: str | None
    members: tuple[MemberReport, ...]
    run: RunId | None
    run_state: str
    plan: PlanReport | None
    runs: tuple[str, ...]
    """Runs whose checkpoints this device holds, newest first, with their last step."""
    run_status: RunStatusReport | None = None
    version: int = REPORT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksReport:
    """How a peer is reached and reaches others; what `p2ptrain doctor` asks for."""

    listen_host: str
    port: int
    discovery: str
    discovery_works: bool
    refusals: dict[str, str]
    """host:port that is not dialled any more -> why."""
    failures: dict[str, str]
    """host:port whose last dial failed -> why."""
    refused_count: int
    """Connections of others that were not let in."""
    last_refusal: str | None
    version: int = REPORT_VERSION
