//! The program's maps. BTF types them for bpftool; names and layouts are
//! [`fence_common::boundary`]'s.

use aya_ebpf::btf_maps::{Array, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use fence_common::boundary::{ABI_VERSION, Config, KEY_SLOTS, RING_BYTES, Workspace};
use fence_common::digest::KeySlot;
use fence_common::rate_limit::{FAILED_MAX, Failed, REPLAY_CACHE_MAX, Sender, Strangers, TRUSTED_MAX, Trusted};
use fence_common::rejected::{REJECTED_MAX, Rejected};
use fence_common::replay_cache::DatagramId;
use fence_common::verdict::Counters;

/// The configuration. Filled before the program is attached.
#[btf_map(name = "fence_config")]
pub(crate) static CONFIG: Array<Config, 1> = Array::new();

/// The prepared keys. Secret.
#[btf_map(name = "fence_keys")]
pub(crate) static KEYS: Array<KeySlot, KEY_SLOTS> = Array::new();

/// How often each verdict was given.
#[btf_map(name = "fence_counters")]
pub(crate) static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// Verified requests for the daemon. Without a value type: libbpf refuses a ring buffer with one.
#[btf_map(name = "fence_requests")]
pub(crate) static REQUESTS: RingBuf<(), RING_BYTES> = RingBuf::new();

/// Trusted senders. Only a right digest adds one, so no flood can evict them.
#[btf_map(name = "fence_trusted")]
pub(crate) static TRUSTED: LruHashMap<Sender, Trusted, TRUSTED_MAX> = LruHashMap::new();

/// Untrusted senders with wrong digests.
#[btf_map(name = "fence_failed")]
pub(crate) static FAILED: LruHashMap<Sender, Failed, FAILED_MAX> = LruHashMap::new();

/// The common record of untrusted senders.
#[btf_map(name = "fence_strangers")]
pub(crate) static STRANGERS: Array<Strangers, 1> = Array::new();

/// The replay cache: when each datagram was accepted. Filled with what an earlier daemon has
/// accepted, before the program is attached.
#[btf_map(name = "fence_replay")]
pub(crate) static REPLAY: LruHashMap<DatagramId, u64, REPLAY_CACHE_MAX> = LruHashMap::new();

/// The time of the daemon's last heartbeat.
#[btf_map(name = "fence_heartbeat")]
pub(crate) static HEARTBEAT: Array<u64, 1> = Array::new();

/// Working memory of a verification: its 1936 bytes do not fit the stack. Used through
/// [`crate::workspace`] only.
#[btf_map(name = "fence_scratch")]
pub(crate) static SCRATCH: PerCpuArray<Workspace, 1> = PerCpuArray::new();

/// The last senders that were rejected before the digest.
#[btf_map(name = "fence_rejected")]
pub(crate) static REJECTED: PerCpuArray<Rejected, REJECTED_MAX> = PerCpuArray::new();

/// The version of the boundary that this object was built with. Its section becomes a read-only
/// map.
// SAFETY: needed, as the daemon finds the version by this section's name. It is plain data, so the
// section endangers no code.
#[unsafe(link_section = ".rodata.abi")]
// SAFETY: needed, as nothing refers to the symbol and it must survive. No other object is linked,
// so the name cannot clash.
#[unsafe(no_mangle)]
pub(crate) static FENCE_XDP_ABI: u32 = ABI_VERSION;
