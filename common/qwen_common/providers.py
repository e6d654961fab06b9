"""The execution providers of ONNX Runtime that artifacts run on, one record for each.

Whoever needs a fact about one takes it from here. Another provider is one record here, and its table of
kernels in the exporter's `backends/onnx/kernels.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

AMD, NVIDIA, INTEL, QUALCOMM, APPLE = "1002", "10de", "8086", "5143", "apple"
# PCI vendors of graphics devices and NPUs. Apple's are on no such bus.
PCI_VENDORS = {AMD: "AMD", NVIDIA: "NVIDIA", INTEL: "Intel", QUALCOMM: "Qualcomm"}


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        key: its name in profiles, manifests, genai_config.json and on the command line.
        title: its usual name.
        onnxruntime_name: what onnxruntime.InferenceSession calls it.
        genai_name: what onnxruntime_genai's Config.append_provider calls it; None runs on the CPU.
        package: what has it: a distribution on PyPI, unless `install` is given.
        install: what to do to get it, where installing `package` from PyPI does not do.
        probe: function of onnxruntime_genai that says whether this install has it; None: always.
        plugin: `module:function` of `package`, where it is a plug-in: a library that ONNX Runtime loads, and
            that lists the devices it can use. The function returns the library's path.
        variable: environment variable that may hold the library's path.
        beside_onnxruntime: by sys.platform, the library's name where it may lie beside ONNX Runtime's own.
        in_catalogue: whether Windows ML's catalogue of providers, part of Windows 11, offers the library.
        systems: values of sys.platform that it is there for; None: every.
        vendors: keys of `PCI_VENDORS`, or `APPLE`, of which it needs a device; None: it needs none.
        float16_varies: whether it has float16 depends on the device.
        software_variable: environment variable that must be 1 for it to run on software in place of a GPU.
        own_memory: weights are not in the computer's memory.
        options: what every artifact needs on it, whoever opens it.
        settings: further options of it that an artifact may set. None names a file, a library, or an address
            in memory.
        appends: whether a generator takes its prompt in several pieces.
        speculative: whether speculative decoding runs on it: in onnxruntime itself, with states in NumPy.
        replaces: in a bundle, which distributions it takes the place of, and the requirement to take instead,
            "" for none. A plug-in takes its own place.
        lowerings: which it has kernels for.
        lacks: of com.microsoft's operators that its lowerings use, those that it has no kernel for, or none
            that answers rightly.
        wrong: of com.microsoft's operators, those that it has a kernel for which answers wrongly without an
            error. A graph with one is not opened on it.
        casts_float16: ONNX Runtime casts to float32 what it has no float16 kernel for.
        weight_bits: of a code of MatMulNBits and QMoE, what a run has shown right. A profile with another
            width is refused.
        fp4_experts: the ONNX Runtime from which on its QMoE reads MXFP4 and NVFP4 experts (run); None: it
            does not.
        int8_cache: a run has shown that its GroupQueryAttention takes keys and values in INT8.
        zero_points_required, exact_blocks, silu_inside: as in the exporter's `graph.targets.Target`.
    """

    key: str
    title: str
    onnxruntime_name: str
    genai_name: str | None
    package: str
    install: str | None = None
    probe: str | None = None
    plugin: str | None = None
    variable: str | None = None
    beside_onnxruntime: Mapping[str, str] = field(default_factory=dict)
    in_catalogue: bool = False
    systems: frozenset[str] | None = None
    vendors: frozenset[str] | None = None
    float16_varies: bool = False
    software_variable: str | None = None
    own_memory: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    settings: frozenset[str] = frozenset()
    appends: bool = True
    speculative: bool = False
    replaces: Mapping[str, str] = field(default_factory=dict)
    lowerings: frozenset[str] = frozenset({"fused", "portable"})
    lacks: frozenset[str] = frozenset()
    wrong: frozenset[str] = frozenset()
    casts_float16: bool = False
    weight_bits: frozenset[int] = frozenset({4, 8})
    fp4_experts: str | None = None
    int8_cache: bool = False
    zero_points_required: bool = False
    exact_blocks: bool = False
    silu_inside: bool = True

    @property
    def advice(self) -> str:
        """What to do to get it."""
        return self.install or f"pip install {self.package}"


CPU = Provider(
    key="cpu",
    title="CPU",
    onnxruntime_name="CPUExecutionProvider",
    genai_name=None,
    package="onnxruntime-genai",
    speculative=True,
    casts_float16=True,
    # tests/exporter/graph/test_experts_kernel.py, tests/exporter/quantize/test_blockwise.py
    weight_bits=frozenset({2, 4, 8}),
    # tests/exporter/graph/test_fp4_experts_kernel.py; 1.31 has no such kernel (run).
    fp4_experts="1.32",
    int8_cache=True,  # tests/exporter/graph/test_kv_cache.py
    # Its kernels apply SiLU value by value, several times slower than QuickGelu, which is vectorised.
    silu_inside=False,
)
# In ONNX Runtime. OpenVINO on its own is a backend: `qwen_common.manifest.BackendName.OPENVINO`.
OPENVINO_EP = Provider(
    key="openvino",
    title="OpenVINO",
    onnxruntime_name="OpenVINOExecutionProvider",
    genai_name="OpenVINO",
    package="onnxruntime-ep-openvino",
    plugin="onnxruntime_ep_openvino:get_library_path",
    systems=frozenset({"linux", "win32"}),
    in_catalogue=True,
    vendors=frozenset({INTEL}),
    settings=frozenset(
        {
            # The provider's own.
            *("device_type", "precision", "num_of_threads", "num_streams", "model_priority"),
            *("enable_opencl_throttling", "enable_qdq_optimizer", "disable_dynamic_shapes"),
            # OpenVINO's, which the backend of that name takes.
            *("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "EXECUTION_MODE_HINT", "PERFORMANCE_HINT"),
            *("DYNAMIC_QUANTIZATION_GROUP_SIZE", "ACTIVATIONS_SCALE_FACTOR", "MODEL_PRIORITY"),
            *("NUM_STREAMS", "INFERENCE_NUM_THREADS", "ENABLE_HYPER_THREADING", "SCHEDULING_CORE_TYPE"),
            *("ENABLE_CPU_PINNING", "ENABLE_CPU_RESERVATION", "COMPILATION_NUM_THREADS"),
            *(
                "KEY_CACHE_PRECISION",
                "VALUE_CACHE_PRECISION",
                "KEY_CACHE_GROUP_SIZE",
                "VALUE_CACHE_GROUP_SIZE",
            ),
        }
    ),
    replaces={"onnxruntime-ep-openvino": "onnxruntime-ep-openvino>=1.8,<2"},
)
_RECORDS = (
    CPU,
    Provider(
        key="cuda",
        title="CUDA",
        onnxruntime_name="CUDAExecutionProvider",
        genai_name="cuda",
        package="onnxruntime-genai-cuda",
        probe="is_cuda_available",
        systems=frozenset({"linux", "win32"}),
        vendors=frozenset({NVIDIA}),
        own_memory=True,
        settings=frozenset(
            {
                *("device_id", "gpu_mem_limit", "arena_extend_strategy", "enable_cuda_graph", "use_tf32"),
                *("enable_skip_layer_norm_strict_mode", "prefer_nhwc", "sdpa_kernel", "fuse_conv_bias"),
                *("do_copy_in_default_stream", "use_ep_level_unified_stream", "tunable_op_enable"),
                *("cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "cudnn_conv1d_pad_to_nc1d"),
            }
        ),
        replaces={
            "onnxruntime": "onnxruntime-gpu",
            "onnxruntime-genai": "onnxruntime-genai-cuda>=0.18,<0.19",
        },
        lacks=frozenset({"QMoE"}),
        wrong=frozenset({"QMoE"}),  # it wants the experts' codes in another order (read)
    ),
    # AMD's umbrella over three of its own: with profile "hip" it is hip-ep, which compiles for the GPU.
    # PyPI has a placeholder, onnxruntime-ep-amdgpu 0.0.0. Nothing of it has run: names, files and the option
    # are from the sources of onnxruntime-genai, of github.com/onnxruntime/onnxruntime-ep-amdgpu, and from
    # docs/quick_start.md of github.com/ROCm/hip-ep (August 2026).
    Provider(
        key="amdgpu",
        title="AMDGPU",
        onnxruntime_name="AMDGPUExecutionProvider",
        genai_name="AMDGPU",
        package="amdgpu-ep of github.com/ROCm/hip-ep",
        install="get amdgpu-ep from github.com/ROCm/hip-ep and put its path into AMDGPU_EP_PATH",
        plugin="onnxruntime_ep_amdgpu:get_library_path",
        variable="AMDGPU_EP_PATH",
        beside_onnxruntime={"win32": "amdgpu-ep.dll", "linux": "libamdgpu-ep.so"},
        in_catalogue=True,
        systems=frozenset({"linux", "win32"}),
        vendors=frozenset({AMD}),
        options={"profile": "hip"},
        settings=frozenset(
            {
                *("device_id", "disable_caching", "force_recompile", "exhaustive_tune"),
                *("cpu_control_flow", "hip_graph_enable"),
            }
        ),
        # Not on the list of hip-ep's docs/supported-operations.md; its QMoE is, and has not been run.
        lacks=frozenset(
            {"FusedMatMul", "GatedRMSNorm", "LinearAttentionGate", "MoE", "QMoE", "QuickGelu"},
        ),
    ),
    Provider(
        key="dml",
        title="DirectML",
        onnxruntime_name="DmlExecutionProvider",
        genai_name="dml",
        package="onnxruntime-genai-winml",
        install="pip install onnxruntime-genai-winml onnxruntime-windowsml, "
        "in place of onnxruntime-genai and onnxruntime",
        probe="is_dml_available",
        systems=frozenset({"win32"}),
        vendors=frozenset(PCI_VENDORS),
        # ONNX Runtime GenAI captures the graph on DirectML unless told not to, which asks for inputs of one
        # size: an attention mask of max_length, and a KV cache that never grows. The exporter writes this
        # into genai_config.json; the runtime says it again where it chooses the provider itself.
        options={"enable_graph_capture": "0"},
        settings=frozenset({"device_id", "performance_preference", "device_filter", "disable_metacommands"}),
        appends=False,  # ONNX Runtime GenAI refuses a second append to a generator
        # GenAI's package takes onnxruntime.dll and DirectML.dll from an installed onnxruntime, and is refused
        # without one (0.18, run on Wine; 1.24.4's and 1.30's both serve).
        replaces={
            "onnxruntime": "onnxruntime-windowsml>=1.30,<2",
            "onnxruntime-genai": "onnxruntime-genai-winml>=0.18,<0.19",
        },
        lowerings=frozenset({"portable"}),
        wrong=frozenset({"GroupQueryAttention"}),  # after a past: tests/exporter/graph/test_directml.py
        # By the same tests: its MatMulNBits leaves a padded K to the CPU, and reads
        # zero points with rows padded to an even count of blocks, so that those of 8 bits are wrong where
        # the count is odd. By its source it subtracts no default zero point where the input is absent. Runs
        # on a software device were right all the same; no GPU's driver was tried, so they stay stored.
        zero_points_required=True,
        exact_blocks=True,
    ),
    Provider(
        key="webgpu",
        title="WebGPU",
        onnxruntime_name="WebGpuExecutionProvider",
        genai_name="webgpu",
        package="onnxruntime-ep-webgpu",
        plugin="onnxruntime_ep_webgpu:get_library_path",
        systems=frozenset({"linux", "win32", "darwin"}),
        vendors=frozenset({*PCI_VENDORS, APPLE}),
        float16_varies=True,  # shader-f16 is an optional feature of WebGPU
        software_variable="ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER",
        settings=frozenset(
            {
                *("preferredLayout", "enableGraphCapture", "validationMode", "powerPreference", "deviceId"),
                *("storageBufferCacheMode", "uniformBufferCacheMode", "queryResolveBufferCacheMode"),
                *("defaultBufferCacheMode", "dawnBackendType", "enableInt64"),
            }
        ),
        replaces={"onnxruntime-ep-webgpu": "onnxruntime-ep-webgpu>=0.4,<1"},
        # Of 0.4.0. Its QMoE takes no zero points, and is wrong now and then, without a word, where a run has
        # more than one token: docs/kernels.md, tests/exporter/graph/test_webgpu_moe.py.
        lacks=frozenset({"FusedMatMul", "MoE", "QMoE"}),
        wrong=frozenset({"QMoE"}),
    ),
    # Its library has the operators, as strings (0.31.0); its predecessor's source has no FusedMatMul, MoE or
    # QuickGelu. QMoE has not been run. ONNX Runtime GenAI 0.18 does not know it by name, and hands names that
    # it does not know to ONNX Runtime, with states in the CPU's memory, which a Mac's GPU shares.
    Provider(
        key="mlx",
        title="MLX",
        onnxruntime_name="MLXExecutionProvider",
        genai_name="MLXExecutionProvider",
        package="onnxruntime-ep-mlx",
        plugin="onnxruntime_ep_mlx:library_path",
        systems=frozenset({"darwin"}),
        vendors=frozenset({APPLE}),
        replaces={"onnxruntime-ep-mlx": "onnxruntime-ep-mlx>=0.31,<1"},
        lacks=frozenset({"FusedMatMul", "MoE", "QMoE", "QuickGelu"}),
    ),
    OPENVINO_EP,
    # GenAI needs its CUDA library beside it, and describes to it the inputs of models without Gated DeltaNet
    # (read in GenAI's source): it is tried last, and is in no profile.
    Provider(
        key="nvtensorrtrtx",
        title="TensorRT-RTX",
        onnxruntime_name="NvTensorRTRTXExecutionProvider",
        genai_name="NvTensorRtRtx",
        package="onnxruntime-ep-nv-tensorrt-rtx",
        install="pip install onnxruntime-ep-nv-tensorrt-rtx, and onnxruntime-genai-cuda for GenAI's part",
        plugin="onnxruntime_ep_nv_tensorrt_rtx:get_library_path",
        in_catalogue=True,
        systems=frozenset({"linux", "win32"}),
        vendors=frozenset({NVIDIA}),
        own_memory=True,
        replaces={
            "onnxruntime-ep-nv-tensorrt-rtx": "onnxruntime-ep-nv-tensorrt-rtx>=0.5,<1",
            "onnxruntime-genai": "onnxruntime-genai-cuda>=0.18,<0.19",
        },
        lowerings=frozenset({"portable"}),
    ),
)
# By key, in the order in which they are tried.
PROVIDERS = {provider.key: provider for provider in _RECORDS}


def named(name: str) -> Provider | None:
    """The provider of a key, or of ONNX Runtime GenAI's name, as genai_config.json has it."""
    found = (provider for provider in PROVIDERS.values() if name in (provider.key, provider.genai_name))
    return next(found, None)
