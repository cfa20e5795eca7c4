//! Runs the loaded kernel program and the judgement in user space on the same frames, by
//! `BPF_PROG_TEST_RUN` and by [`fence_common::frame::judge`]. It compares the verdict (by the
//! counter that moved), the answer, and the ring buffer.
//!
//! Rate limits and the replay cache depend on earlier frames. `parity.rs` compares them over
//! sequences.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::boundary::{Config, Event, KEY_SLOT_ACTIVE};
use fence_common::digest::PreparedKey;
use fence_common::frame::judge;
use fence_common::memory_store::MemoryStore;
use fence_common::verdict::{Action, Counters, Verdict};
use fence_lab::loaded::{self, Loaded, Ring, XDP_DROP, XDP_PASS};

use super::case::{Case, Setting};
use super::make::{Keys, Maker};

/// Cases that share one key and configuration. Writing these into the maps costs as much as a few
/// cases.
const TOGETHER: u64 = 64;

/// Cases that share one copy of the program. They fit into its memories, because what a full memory
/// forgets is the kernel's choice.
const ONE_COPY: u64 = 8192;

/// The judgement in user space, with all that it remembers.
struct Reference {
    config: Config,
    key: PreparedKey,
    records: MemoryStore,
}

impl Reference {
    fn judge(&mut self, frame: &[u8]) -> Verdict {
        let slots = [self.key.dangerous_slot()];
        let judged = judge(frame, &self.config, &slots, &mut self.records, loaded::now());
        judged.map_or_else(|verdict| verdict, |_| Verdict::Delivered)
    }
}

/// Both judges, set alike.
pub(super) struct Pair {
    program: Loaded,
    ring: Ring,
    keys: Keys,
    reference: Reference,
    setting: Setting,
    counted: Counters,
}

impl Pair {
    /// Loads a copy of the program.
    pub(super) fn load() -> Result<Self> {
        let (mut program, keys, setting) = (Loaded::fence()?, Keys::read()?, Setting::default());
        let ring = program.ring()?;
        let key = keys.prepared(setting.key);
        let reference = Reference { config: setting.config(), key, records: MemoryStore::default() };
        let counted = loaded::counters(&program.ebpf)?;
        let mut pair = Self { program, ring, keys, reference, setting, counted };
        pair.set(setting)?;
        Ok(pair)
    }

    fn set(&mut self, setting: Setting) -> Result<()> {
        self.reference.config = setting.config();
        self.reference.key = self.keys.prepared(setting.key);
        loaded::configure(&mut self.program.ebpf, self.reference.config)?;
        loaded::set_slot(&mut self.program.ebpf, KEY_SLOT_ACTIVE, Some(&self.reference.key))?;
        self.setting = setting;
        Ok(())
    }

    /// Runs a case on both and says the verdict, which is the same.
    ///
    /// # Errors
    /// The two differ, or the program cannot be run.
    pub(super) fn run(&mut self, case: &Case) -> Result<Verdict> {
        if case.setting != self.setting {
            self.set(case.setting)?;
        }
        let differ = |what: String| anyhow!("{what}: {case}");
        let expected = self.reference.judge(&case.frame);
        let (answer, _) = self.program.run(&case.frame, 1)?;
        let counted = loaded::counters(&self.program.ebpf)?;
        let verdict = moved(&self.counted, &counted).map_err(differ)?;
        self.counted = counted;
        ensure!(verdict == expected, differ(format!("user space says {expected:?}, the kernel {verdict:?}")));
        let wanted = match verdict.action() {
            Action::Deliver | Action::Drop => XDP_DROP,
            Action::Pass => XDP_PASS,
        };
        ensure!(answer == wanted, differ(format!("the answer to {verdict:?} is {answer}")));
        let event = self.ring.next_event()?;
        ensure!(event.is_some() == (verdict == Verdict::Delivered), differ(format!("an event after {verdict:?}?")));
        if let Some(event) = event {
            ensure!(carries(&case.frame, &event), differ("the event is not what the frame carries".to_owned()));
            ensure!(self.ring.next_event()?.is_none(), differ("more than one event".to_owned()));
        }
        Ok(verdict)
    }
}

/// Whether the frame has the event's request in it, and before it the address that it came from.
fn carries(frame: &[u8], event: &Event) -> bool {
    let request = zerocopy::IntoBytes::as_bytes(&event.request);
    let at = frame.windows(request.len()).position(|bytes| bytes == request);
    let source: &[u8] = match event.family {
        fence_common::wire::FAMILY_V4 => &event.source[..4],
        _ => &event.source,
    };
    at.is_some_and(|at| frame[..at].windows(source.len()).any(|bytes| bytes == source))
}

/// The verdict whose counter moved: none or one, and by one.
fn moved(before: &Counters, after: &Counters) -> Result<Verdict, String> {
    let mut moved = before.iter().zip(after.iter()).filter(|((_, before), (_, after))| before != after);
    let Some(((name, before), (_, after))) = moved.next() else { return Ok(Verdict::NotOurs) };
    if moved.next().is_some() || after != before + 1 {
        return Err(format!("more than one counter moved, or {name} by more than one"));
    }
    let verdict = Verdict::COUNTED.into_iter().find(|verdict| verdict.counter_name() == Some(name));
    verdict.ok_or_else(|| format!("no verdict for {name}"))
}

/// How many cases came to each verdict.
#[derive(Debug, Default)]
pub(super) struct Coverage(BTreeMap<String, u64>);

impl Coverage {
    fn add(&mut self, verdict: Verdict) {
        *self.0.entry(format!("{verdict:?}")).or_default() += 1;
    }

    /// Adds another one's.
    pub(super) fn merge(&mut self, other: Self) {
        for (name, count) in other.0 {
            *self.0.entry(name).or_default() += count;
        }
    }

    /// How many cases came to this verdict.
    pub(super) fn of(&self, verdict: Verdict) -> u64 {
        self.0.get(&format!("{verdict:?}")).copied().unwrap_or(0)
    }

    /// Verdicts by name, with the number of cases.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, count)| (name.as_str(), *count))
    }
}

/// Runs so many cases, made from a seed.
///
/// # Errors
/// The two differ, or the program cannot be run.
pub(super) fn run(seed: u64, cases: u64) -> Result<Coverage> {
    let mut pair = Pair::load()?;
    let mut maker = Maker::new(seed).context("the fixtures")?;
    let mut coverage = Coverage::default();
    for number in 0..cases {
        if number > 0 && number % ONE_COPY == 0 {
            pair = Pair::load()?;
        }
        if number % TOGETHER == 0 {
            maker.change_setting();
        }
        let case = maker.make();
        // What came before counts too: the seed and the number lead there again.
        let verdict = pair.run(&case).with_context(|| format!("case {number} from seed {seed}"))?;
        coverage.add(verdict);
    }
    Ok(coverage)
}
