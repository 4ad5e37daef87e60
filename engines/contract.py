"""Contracts of the modules: the names of their inputs and the layout of their parameter rows.

Export writes graphs to them and the runtime feeds them; neither defines a name of its own.

Shape legend: B rows = requests × branches, requests-major; R requests (parameter rows);
G branches of a request; T image tokens; C text width; h, w latent size. The UNet's graph derives
the number of branches as B / R and reduces statistics per parameter row, so a host that sends
R = B rows gets statistics per branch (scope `branch`), and one that sends a row per request gets
them per request.
"""

SAMPLE = "sample"  # [B, 4, h, w], already scaled by the schedule's k_t
TIMESTEP = "timestep"  # [B] float32
TEXT = "encoder_hidden_states"  # [B, L, C], L a multiple of TEXT_POSITIONS; older exports: 77
POOLED_TEXT = "text_embeds"  # [B, P]
TIME_IDS = "time_ids"  # [B, 6] float32
IMAGE_TOKENS = "image_tokens"  # [B, T, C]
TOKEN_MASK = "token_mask"  # [B, T] float32, only where T is the most that a request may have
IP_ADAPTER_SCALE = "ip_adapter_scale"  # [R, parts] float32, λ of Eq. 1
MANIPULATION = "attention_manipulation"  # [R, parts, columns] float32
NOISE_PREDICTION = "noise_prediction"  # [B, 4, h, w]

# Module vae_decoder: it takes latents and gives the same picture twice.
PICTURE = "picture"  # [B, 3, H, W] float32 in [0, 1]
PIXELS = "pixels"  # [B, H, W, 3] uint8, rounded half to even; exports of older versions lack it

MASKED = -1e30
"""Value of `TOKEN_MASK` for a row of image tokens that is not there, 0 for one that is: it is added
to the logits, so that nothing looks at the row, and statistics over tokens leave it out."""

TEXT_POSITIONS = 77
"""Positions of one window of a prompt: start, 75 tokens, end."""

MAX_WINDOWS = 3
"""Windows of a prompt at most; what is beyond them is cut."""

PARTS = ("down", "mid", "up")
"""Parts of the UNet, in the order of the second axis of the two parameter inputs."""

KINDS = ("off", "scale_power", "softmask")
"""Kinds of attention manipulation; the index is the value of column `kind`."""

MANIPULATION_COLUMNS = (
    "kind",  # index into KINDS
    "scale",  # s of Eq. 7 and 9
    "power",  # p of Eq. 7
    "quantile",  # level of Q in Eq. 8
    "sharpness",  # d of Eq. 9
    "adain_weight",  # w of Eq. 10; 1 leaves AdaIN out
    "invert_first_token",  # 1 or 0, appendix E
    "upper_bound",  # f(A) is clamped to it
)

# Module guidance_step: all float32; it takes noise_prediction too.
LATENTS = "latents"  # [R, 4, h, w], x
NOISE = "noise"  # [R, 4, h, w], z; zeros where the scheduler adds none
COEFFICIENTS = "coefficients"  # [R, G], of the branches in the sum ε̂
SPREAD = "spread"  # [R, G], weights of the branches' standard deviations in σ̄
RESCALE = "rescale"  # [R], φ of Eq. 5; 0 leaves ε̂ alone
STEP = "step"  # [R, 3], (a, b, c) of x' = a x + b ε + c z
INPUT_SCALE = "input_scale"  # [R], k of the next step
NEXT_LATENTS = "next_latents"  # [R, 4, h, w], x'
GUIDED = "guided"  # [R, 4, h, w], ε
# ... and `sample`, k x' [R, 4, h, w], what the next UNet call takes.

FUNCTION_DOMAIN = "fastface"
FUNCTION_NAME = "DecoupledAttention"

KERNEL_DOMAIN = "fastface.kernels"
"""Domain of the custom operator of the same name, which ONNX Runtime gets from a library.

It takes q [B,N,H·D], k and v [B,T,H·D], manipulation [R,8] and ip_scale [R] in float32, optionally
base [B,N,H·D] and token_mask [B,T] in float32; returns base + λ f(A) V'. Attribute num_heads.
"""
