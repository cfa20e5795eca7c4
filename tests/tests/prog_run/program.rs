//! The program under test: loads it, configures it, runs it on frames, and reads its counters and
//! events.

use std::cell::RefCell;
use std::collections::BTreeMap;

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues, RingBuf};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use fence_common::admit::Rules;
use fence_common::boundary::{Config, Event, KEY_SLOT_ACTIVE, KEY_SLOTS, Listener, Workspace, empty_slot, name};
use fence_common::digest::PreparedKey;
use fence_common::frame::judge;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::memory_store::MemoryStore;
use fence_common::rate_limit::{Failed, Limits, Sender, Strangers, Trusted};
use fence_common::replay_cache::DatagramId;
use fence_common::verdict::{Action, Counters, Verdict};
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, Request};
use fence_lab::loaded::{self, XDP_DROP, XDP_PASS};
use zerocopy::FromZeros as _;

pub(crate) use fence_lab::loaded::{SHORTEST, now};

/// From <linux/pkt_cls.h>.
const TCX_DROP: u32 = 2;
const TCX_NEXT: u32 = u32::MAX;

/// One of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Xdp,
    Tc,
}

impl Form {
    pub(crate) const ALL: [Self; 2] = [Self::Xdp, Self::Tc];

    /// The shortest frame for the kernel's test run. It needs an Ethernet header, and for tc
    /// programs the whole announced IP header.
    pub(crate) fn shortest(self) -> usize {
        match self {
            Self::Xdp => SHORTEST,
            Self::Tc => SHORTEST + 40,
        }
    }

    /// The program's return value for a verdict.
    fn answer(self, action: Action) -> u32 {
        match (self, action) {
            (Self::Xdp, Action::Deliver | Action::Drop) => XDP_DROP,
            (Self::Xdp, Action::Pass) => XDP_PASS,
            (Self::Tc, Action::Deliver | Action::Drop) => TCX_DROP,
            (Self::Tc, Action::Pass) => TCX_NEXT,
        }
    }
}

/// Both families, the default groups and port.
pub(crate) fn listener(min_hash: HashKind, strict_source: bool) -> Listener {
    Listener {
        group_v4: Some(DEFAULT_GROUP_V4),
        group_v6: Some(DEFAULT_GROUP_V6),
        port: DEFAULT_PORT,
        rules: Rules { min_hash, strict_source },
        limits: Limits::NONE,
    }
}

/// Fails, with the remedy, where the tests cannot run.
pub(crate) fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "BPF needs root. Remedy: run the tests as root, as `cargo xtask test` does"
    );
}

/// The counters of senders: failures, and datagrams over a limit; for trusted senders also
/// requests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) trusted: BTreeMap<Sender, [u64; 3]>,
    pub(crate) failed: BTreeMap<Sender, [u64; 2]>,
    pub(crate) strangers: [u64; 2],
}

impl Known {
    fn add_trusted(&mut self, sender: Sender, known: Trusted) {
        self.trusted.insert(sender, [known.failures, known.over_limit, known.deliveries]);
    }

    fn add_failed(&mut self, sender: Sender, known: Failed) {
        self.failed.insert(sender, [known.failures, known.over_limit]);
    }
}

/// A loaded copy of the program.
pub(crate) struct Program {
    form: Form,
    ebpf: Ebpf,
    ring: RingBuf<MapData>,
    config: Config,
    keys: [Option<PreparedKey>; KEY_SLOTS],
    /// User space's knowledge of senders and datagrams.
    records: RefCell<MemoryStore>,
}

impl Program {
    /// Loads a copy of the XDP program and fills its maps.
    pub(crate) fn load(listener: &Listener, key: Option<&Key>) -> Self {
        Self::load_as(Form::Xdp, listener, key)
    }

    /// Loads a copy of either program and fills its maps.
    pub(crate) fn load_as(form: Form, listener: &Listener, key: Option<&Key>) -> Self {
        require_root();
        let mut ebpf = loaded::load_object().unwrap_or_else(|error| panic!("{error:#}"));
        match form {
            Form::Xdp => {
                let xdp: &mut Xdp =
                    ebpf.program_mut(name::XDP).expect("the program").try_into().expect("an XDP program");
                xdp.load().expect("the verifier accepts the program");
            }
            Form::Tc => {
                let tc = ebpf.program_mut(name::TC).expect("the program");
                let tc: &mut SchedClassifier = tc.try_into().expect("a tc program");
                tc.load().expect("the verifier accepts the program");
            }
        }
        let ring = RingBuf::try_from(ebpf.take_map(name::REQUESTS).expect("the ring")).expect("a ring buffer");
        let mut program = Self {
            form,
            ebpf,
            ring,
            config: Config::new(listener),
            keys: [const { None }; KEY_SLOTS],
            records: RefCell::default(),
        };
        program.configure(Config::new(listener));
        program.set_key(key);
        program.set_heartbeat(u64::MAX);
        program
    }

    /// Replaces the rate limits.
    pub(crate) fn limit(&mut self, limits: Limits) {
        self.configure(Config { limits, ..self.config });
    }

    /// The program's knowledge of senders.
    fn senders(&self) -> Known {
        let mut kernel = Known::default();
        let map =
            HashMap::<_, [u8; size_of::<Sender>()], [u64; 5]>::try_from(self.map(name::TRUSTED)).expect("its layout");
        for entry in map.iter() {
            let (sender, words) = entry.expect("a read");
            kernel.add_trusted(zerocopy::transmute!(sender), zerocopy::transmute!(words));
        }
        let map =
            HashMap::<_, [u8; size_of::<Sender>()], [u64; 4]>::try_from(self.map(name::FAILED)).expect("its layout");
        for entry in map.iter() {
            let (sender, words) = entry.expect("a read");
            kernel.add_failed(zerocopy::transmute!(sender), zerocopy::transmute!(words));
        }
        let map = Array::<_, [u64; 5]>::try_from(self.map(name::STRANGERS)).expect("its layout");
        let strangers: Strangers = zerocopy::transmute!(map.get(&0, 0).expect("a read"));
        kernel.strangers = [strangers.failures, strangers.over_limit];
        kernel
    }

    /// The program's and user space's knowledge of senders, which must agree except for times.
    pub(crate) fn known(&self) -> Known {
        let kernel = self.senders();
        let records = self.records.borrow();
        let mut user = Known::default();
        records.trusted().for_each(|(sender, trusted)| user.add_trusted(*sender, *trusted));
        records.failed().for_each(|(sender, failed)| user.add_failed(*sender, *failed));
        user.strangers = [records.strangers().failures, records.strangers().over_limit];
        assert_eq!(kernel, user, "the program knows what user space knows");
        kernel
    }

    /// Clears all knowledge of senders.
    pub(crate) fn forget(&mut self) {
        *self.records.borrow_mut() = MemoryStore::default();
        let known = self.senders();
        let map = self.ebpf.map_mut(name::TRUSTED).expect("the map");
        let mut map = HashMap::<_, [u8; size_of::<Sender>()], [u64; 5]>::try_from(map).expect("its layout");
        for sender in known.trusted.keys() {
            map.remove(&zerocopy::transmute!(*sender)).expect("it is there");
        }
        let map = self.ebpf.map_mut(name::FAILED).expect("the map");
        let mut map = HashMap::<_, [u8; size_of::<Sender>()], [u64; 4]>::try_from(map).expect("its layout");
        for sender in known.failed.keys() {
            map.remove(&zerocopy::transmute!(*sender)).expect("it is there");
        }
        let map = self.ebpf.map_mut(name::STRANGERS).expect("the map");
        Array::<_, [u64; 5]>::try_from(map).expect("its layout").set(0, [0; 5], 0).expect("a write");
    }

    /// Sets the time at which a datagram was accepted, for program and user space.
    pub(crate) fn set_accepted(&mut self, request: &Request, at: u64) {
        let datagram_id = DatagramId::of(request).expect("a digest");
        let map = self.ebpf.map_mut(name::REPLAY).expect("the map");
        let mut map = HashMap::<_, [u8; size_of::<DatagramId>()], u64>::try_from(map).expect("its layout");
        map.insert(datagram_id.digest, at, 0).expect("a write");
        self.records.borrow_mut().replay_cache.note(*datagram_id, at);
    }

    fn map(&self, name: &str) -> &Map {
        self.ebpf.map(name).expect("the map")
    }

    /// Sets the time of the daemon's last sign of life. A future time counts as now.
    pub(crate) fn set_heartbeat(&mut self, at: u64) {
        loaded::beat(&mut self.ebpf, at).expect("a write");
    }

    /// Replaces the configuration.
    pub(crate) fn configure(&mut self, config: Config) {
        loaded::configure(&mut self.ebpf, config).expect("a write");
        self.config = config;
    }

    /// Replaces or removes the key.
    pub(crate) fn set_key(&mut self, key: Option<&Key>) {
        self.set_slot(KEY_SLOT_ACTIVE, key);
    }

    /// Replaces or removes the key in one of the slots.
    pub(crate) fn set_slot(&mut self, index: u32, key: Option<&Key>) {
        let prepared = key.map(PreparedKey::new);
        loaded::set_slot(&mut self.ebpf, index, prepared.as_ref()).expect("a write");
        self.keys[index as usize] = prepared;
    }

    /// User space's verdict on a frame.
    pub(crate) fn user_space(&self, frame: &[u8]) -> Verdict {
        let empty = empty_slot();
        let slots = self.keys.each_ref().map(|key| key.as_ref().map_or(&empty, PreparedKey::dangerous_slot));
        judge(frame, &self.config, &slots, &mut *self.records.borrow_mut(), now())
            .map_or_else(|verdict| verdict, |_| Verdict::Delivered)
    }

    /// The counters, summed over all CPUs.
    pub(crate) fn counters(&self) -> Counters {
        loaded::counters(&self.ebpf).expect("a read")
    }

    /// Marks every CPU's working memory as in use, or as free.
    pub(crate) fn set_in_use(&mut self, in_use: bool) {
        let workspace = Workspace { in_use: u64::from(in_use), ..Workspace::new_zeroed() };
        let element: [u8; size_of::<Workspace>()] = zerocopy::transmute!(workspace);
        let cpus = aya::util::nr_cpus().expect("the number of CPUs");
        let values = PerCpuValues::try_from(vec![element; cpus]).expect("a value for each CPU");
        let map = self.ebpf.map_mut(name::SCRATCH).expect("the map");
        let mut map = PerCpuArray::<_, [u8; size_of::<Workspace>()]>::try_from(map).expect("its layout");
        map.set(0, values, 0).expect("a write");
    }

    /// The CPUs whose working memory is in use.
    fn in_use(&self) -> Vec<u64> {
        let map = self.ebpf.map(name::SCRATCH).expect("the map");
        let map = PerCpuArray::<_, [u8; size_of::<Workspace>()]>::try_from(map).expect("its layout");
        let values = map.get(&0, 0).expect("a read");
        values
            .iter()
            .map(|element| {
                let workspace: Workspace = zerocopy::transmute!(*element);
                workspace.in_use
            })
            .collect()
    }

    /// Runs the program on a frame. Returns its answer, and the one verdict that it counted.
    ///
    /// The answer must be the verdict's action. At most one counter may rise, by one. A run that
    /// took the working memory must have released it.
    pub(crate) fn run(&self, frame: &[u8]) -> Verdict {
        let before = self.counters();
        let in_use = self.in_use();
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() };
        let answer = match self.form {
            Form::Xdp => {
                let xdp: &Xdp = self.ebpf.program(name::XDP).expect("the program").try_into().expect("an XDP program");
                xdp.test_run(options)
            }
            Form::Tc => {
                let tc = self.ebpf.program(name::TC).expect("the program");
                let tc: &SchedClassifier = tc.try_into().expect("a tc program");
                tc.test_run(options)
            }
        };
        let answer = answer.expect("a test run").return_value;
        let after = self.counters();
        assert_eq!(self.in_use(), in_use, "the working memory is given back by who took it");

        let mut moved = before.iter().zip(after.iter()).filter(|((_, before), (_, after))| before != after);
        let verdict = match moved.next() {
            None => Verdict::NotOurs,
            Some(((name, before), (_, after))) => {
                assert_eq!(after, before + 1, "{name} moved by more than one");
                let verdict = Verdict::COUNTED.into_iter().find(|verdict| verdict.counter_name() == Some(name));
                verdict.expect("each counter has its verdict")
            }
        };
        assert!(moved.next().is_none(), "more than one counter moved");
        let expected = self.form.answer(verdict.action());
        assert_eq!(answer, expected, "the answer to {verdict:?}");
        verdict
    }

    /// Asserts the verdict of program and user space. Only a delivered frame may have an event.
    #[track_caller]
    pub(crate) fn expect(&mut self, frame: &[u8], verdict: Verdict) {
        assert_eq!(self.user_space(frame), verdict, "in user space");
        assert_eq!(self.run(frame), verdict, "in the kernel");
        assert_eq!(self.event().is_some(), verdict == Verdict::Delivered, "an event");
        assert!(self.event().is_none(), "one event at most");
    }

    /// The next event.
    pub(crate) fn event(&mut self) -> Option<Event> {
        self.ring.next().map(|record| Event::decode(&record).expect("an event of this version"))
    }
}
