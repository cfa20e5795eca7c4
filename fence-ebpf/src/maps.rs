//! The program's maps, typed for bpftool by BTF. Names and layouts are those of [`fence_common::boundary`].

use aya_ebpf::btf_maps::{Array, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use fence_common::boundary::{ABI_VERSION, Config, KEY_SLOTS, RING_BYTES, Workspace};
use fence_common::digest::KeySlot;
use fence_common::rate_limit::{FAILED_MAX, Failed, REPLAY_CACHE_MAX, Sender, Strangers, TRUSTED_MAX, Trusted};
use fence_common::rejected::{REJECTED_MAX, Rejected};
use fence_common::replay_cache::DatagramId;
use fence_common::verdict::Counters;

/// What to recognise and to demand. Filled before the program is attached.
#[btf_map(name = "fence_config")]
pub(crate) static CONFIG: Array<Config, 1> = Array::new();

/// The prepared keys. Secret.
#[btf_map(name = "fence_keys")]
pub(crate) static KEYS: Array<KeySlot, KEY_SLOTS> = Array::new();

/// How often each verdict was given.
#[btf_map(name = "fence_counters")]
pub(crate) static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// Verified requests on their way to the daemon. Without a value type: a sized one makes libbpf refuse the map.
#[btf_map(name = "fence_requests")]
pub(crate) static REQUESTS: RingBuf<(), RING_BYTES> = RingBuf::new();

/// Senders whose digest was right. Only a right digest adds one, so no flood can push them out.
#[btf_map(name = "fence_trusted")]
pub(crate) static TRUSTED: LruHashMap<Sender, Trusted, TRUSTED_MAX> = LruHashMap::new();

/// Other senders whose digest was wrong.
#[btf_map(name = "fence_failed")]
pub(crate) static FAILED: LruHashMap<Sender, Failed, FAILED_MAX> = LruHashMap::new();

/// All of those together.
#[btf_map(name = "fence_strangers")]
pub(crate) static STRANGERS: Array<Strangers, 1> = Array::new();

/// When which datagram was accepted. Filled with what an earlier daemon has accepted before the program is attached.
#[btf_map(name = "fence_replay")]
pub(crate) static REPLAY: LruHashMap<DatagramId, u64, REPLAY_CACHE_MAX> = LruHashMap::new();

/// When the daemon has shown its last sign of life.
#[btf_map(name = "fence_heartbeat")]
pub(crate) static HEARTBEAT: Array<u64, 1> = Array::new();

/// Working memory of a verification: 1936 bytes are more than the stack has. Used through [`crate::workspace`] only.
#[btf_map(name = "fence_scratch")]
pub(crate) static SCRATCH: PerCpuArray<Workspace, 1> = PerCpuArray::new();

/// Who was refused last before any digest.
#[btf_map(name = "fence_rejected")]
pub(crate) static REJECTED: PerCpuArray<Rejected, REJECTED_MAX> = PerCpuArray::new();

/// The version of the boundary that this object was built with, in a section that becomes a read-only map.
// SAFETY: a section name is a promise to the linker, and only code can be endangered by it: this is plain data.
#[unsafe(link_section = ".rodata.abi")]
// SAFETY: the symbol must survive though nothing refers to it; no other object is linked, so the name cannot clash.
#[unsafe(no_mangle)]
pub(crate) static FENCE_XDP_ABI: u32 = ABI_VERSION;
