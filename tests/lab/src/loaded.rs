//! The kernel program alone: loaded, with its maps filled, run on frames by `BPF_PROG_TEST_RUN`. An
//! empty program serves for comparison.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::{Array, MapData, PerCpuArray, RingBuf};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use fence_common::boundary::{Config, Event, empty_slot, name};
use fence_common::digest::{KeySlot, PreparedKey};
use fence_common::verdict::{COUNTERS, Counters};
use object::write::{Object, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

use crate::tools;

/// From <linux/bpf.h>.
pub const XDP_DROP: u32 = 1;
/// From <linux/bpf.h>.
pub const XDP_PASS: u32 = 2;

/// The kernel's test run refuses frames without a whole Ethernet header.
pub const SHORTEST: usize = 14;

/// Where `cargo xtask build` leaves the object, unless `FENCE_EBPF_OBJECT` says another place.
#[must_use]
pub fn object_path() -> PathBuf {
    let built = || tools::workspace().join("target/bpf/fence-xdp.o");
    std::env::var_os("FENCE_EBPF_OBJECT").map_or_else(built, PathBuf::from)
}

/// The program's clock.
#[must_use]
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, rest) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds * 1_000_000_000 + rest
}

/// The object with its maps.
pub fn load_object() -> Result<Ebpf> {
    let path = object_path();
    let object = std::fs::read(&path)
        .with_context(|| format!("{} cannot be read. Remedy: `cargo xtask build`", path.display()))?;
    load(&object)
}

fn load(object: &[u8]) -> Result<Ebpf> {
    Ebpf::load(object).context("the object and its maps. Remedy: BPF needs root, as which `cargo xtask test` runs it")
}

/// Writes the program's configuration.
pub fn configure(ebpf: &mut Ebpf, config: Config) -> Result<()> {
    let bytes: [u8; size_of::<Config>()] = zerocopy::transmute!(config);
    let map = ebpf.map_mut(name::CONFIG).context("no configuration map")?;
    Array::<_, [u8; size_of::<Config>()]>::try_from(map)?.set(0, bytes, 0).context("the configuration")
}

/// Writes a key to its slot, or takes it away.
pub fn set_slot(ebpf: &mut Ebpf, index: u32, key: Option<&PreparedKey>) -> Result<()> {
    let empty = empty_slot();
    let bytes: &[u8; size_of::<KeySlot>()] = zerocopy::transmute_ref!(key.map_or(&empty, PreparedKey::dangerous_slot));
    let map = ebpf.map_mut(name::KEYS).context("no key map")?;
    Array::<_, [u8; size_of::<KeySlot>()]>::try_from(map)?.set(index, bytes, 0).context("the key")
}

/// Writes when the daemon has shown its last sign of life. In the future is now.
pub fn beat(ebpf: &mut Ebpf, at: u64) -> Result<()> {
    let map = ebpf.map_mut(name::HEARTBEAT).context("no heartbeat")?;
    Array::<_, u64>::try_from(map)?.set(0, at, 0).context("the heartbeat")
}

/// The counters of all CPUs together.
pub fn counters(ebpf: &Ebpf) -> Result<Counters> {
    let map = ebpf.map(name::COUNTERS).context("no counters")?;
    let map = PerCpuArray::<_, [u64; COUNTERS]>::try_from(map)?;
    let mut sum = Counters::default();
    for cpu in map.get(&0, 0)?.iter() {
        sum.add(zerocopy::transmute_ref!(cpu));
    }
    Ok(sum)
}

/// A loaded program that runs on frames that are given to it, and on nothing else.
pub struct Loaded {
    /// Its maps.
    pub ebpf: Ebpf,
    program: &'static str,
    /// How long the kernel took to verify and compile it.
    pub load_time: Duration,
}

/// What the kernel knows of a loaded program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Bytes of BPF instructions after the verifier, eight each.
    pub translated: u32,
    /// Bytes of machine code.
    pub compiled: u32,
    /// How many instructions the verifier walked through, of a million that it may.
    pub verified: u32,
}

impl Loaded {
    /// Loads the kernel program.
    pub fn fence() -> Result<Self> {
        let mut loaded = Self::load(load_object()?, name::XDP)?;
        // For as long as there is time.
        beat(&mut loaded.ebpf, u64::MAX)?;
        Ok(loaded)
    }

    /// Loads an XDP program that passes everything and does nothing else: what any program costs.
    pub fn empty() -> Result<Self> {
        Self::load(load(&empty_object()?)?, EMPTY)
    }

    fn load(mut ebpf: Ebpf, program: &'static str) -> Result<Self> {
        let xdp: &mut Xdp = ebpf.program_mut(program).context("no such program")?.try_into()?;
        let begin = Instant::now();
        xdp.load().context("the verifier refuses the program")?;
        let load_time = begin.elapsed();
        Ok(Self { ebpf, program, load_time })
    }

    /// Runs the program on a frame `repeat` times: its last answer, and the time of one run by the
    /// kernel's clock.
    pub fn run(&self, frame: &[u8], repeat: u32) -> Result<(u32, Duration)> {
        let xdp: &Xdp = self.ebpf.program(self.program).context("no such program")?.try_into()?;
        let options = TestRunOptions { data_in: Some(frame), repeat, ..TestRunOptions::default() };
        let result = xdp.test_run(options).context("a test run")?;
        Ok((result.return_value, result.duration))
    }

    /// The ring buffer, to be had once.
    ///
    /// # Errors
    /// It has been taken before.
    pub fn ring(&mut self) -> Result<Ring> {
        Ok(Ring(RingBuf::try_from(self.ebpf.take_map(name::REQUESTS).context("no ring buffer")?)?))
    }

    /// How large it is, and what the verifier had to do for it.
    pub fn size(&self) -> Result<Size> {
        let xdp: &Xdp = self.ebpf.program(self.program).context("no such program")?.try_into()?;
        let info = xdp.info()?;
        Ok(Size {
            translated: info.size_translated().unwrap_or(0),
            compiled: info.size_jitted(),
            verified: info.verified_instruction_count().unwrap_or(0),
        })
    }
}

/// The reading end of the ring buffer.
pub struct Ring(RingBuf<MapData>);

impl Ring {
    /// The next request that the program has handed over.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        self.0.next().map(|record| Event::decode(&record)).transpose().context("a record in the ring")
    }
}

const EMPTY: &str = "empty";

/// `return XDP_PASS`, as an object that loaders take.
fn empty_object() -> Result<Vec<u8>> {
    let endianness = if cfg!(target_endian = "big") { Endianness::Big } else { Endianness::Little };
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, endianness);
    let licence = object.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(licence, b"GPL\0", 1);
    let section = object.add_section(Vec::new(), b"xdp".to_vec(), SectionKind::Text);
    // r0 = 2 (XDP_PASS); exit
    let pass = if cfg!(target_endian = "big") { [0, 0, 0, 2] } else { [2, 0, 0, 0] };
    let mut code = vec![0xb7, 0, 0, 0];
    code.extend(pass);
    code.extend([0x95, 0, 0, 0, 0, 0, 0, 0]);
    let size = code.len() as u64;
    object.append_section_data(section, &code, 8);
    object.add_symbol(Symbol {
        name: EMPTY.into(),
        value: 0,
        size,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    object.write().context("an ELF object")
}
