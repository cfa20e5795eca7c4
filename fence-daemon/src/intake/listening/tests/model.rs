//! Tests the decisions against a model of the kernel, in which anything may happen at any time.

use proptest::prelude::*;

use super::{NAME, occupied};
use crate::intake::listening::*;

/// One interface of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Device {
    /// The last digit of its name, `virbr0` and so on.
    name: u32,
    /// The kernel's number for it.
    number: u32,
    /// The interface's identity: a new one differs from all before, whatever its name and index.
    which: u32,
    up: bool,
    /// In another namespace.
    away: bool,
}

/// The kernel as far as it matters.
#[derive(Debug, Default)]
struct Kernel {
    /// Whether the interface is named; otherwise the listener uses all that are up.
    named: bool,
    devices: Vec<Device>,
    made: u32,
    /// What the socket has joined: index and identity.
    members: Vec<(u32, u32)>,
    /// The program's links: the index at creation, the interface it is on (which may be deleted),
    /// and whether in the best way.
    links: Vec<(u32, u32, bool)>,
    /// Another program: 1 leaves only a second-best way, 2 none.
    occupied: u8,
    full: bool,
    /// XDP, the best way otherwise, would mistake VLANs.
    vlans: bool,
    pending: Changes,
}

#[derive(Clone, Debug)]
enum Event {
    Make { name: u32, number: u32 },
    Delete(u32),
    Rename { from: u32, to: u32 },
    Move(u32),
    Back(u32),
    Switch(u32, bool),
    Occupy(u8),
    Fill(bool),
    Vlans(bool),
    TakeOff,
    LoseMessages,
    Look,
    LookAgain,
}

fn event() -> impl Strategy<Value = Event> {
    let name = 0..3_u32;
    prop_oneof![
        4 => (name.clone(), 5..9_u32).prop_map(|(name, number)| Event::Make { name, number }),
        2 => name.clone().prop_map(Event::Delete),
        1 => (name.clone(), name.clone()).prop_map(|(from, to)| Event::Rename { from, to }),
        1 => name.clone().prop_map(Event::Move),
        1 => name.clone().prop_map(Event::Back),
        3 => (name, any::<bool>()).prop_map(|(name, up)| Event::Switch(name, up)),
        1 => (0..3_u8).prop_map(Event::Occupy),
        1 => any::<bool>().prop_map(Event::Fill),
        1 => any::<bool>().prop_map(Event::Vlans),
        1 => Just(Event::TakeOff),
        1 => Just(Event::LoseMessages),
        4 => Just(Event::Look),
        1 => Just(Event::LookAgain),
    ]
}

impl Kernel {
    fn here(&self, name: u32) -> Option<usize> {
        self.devices.iter().position(|device| device.name == name && !device.away)
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Make { name, number } => {
                let taken = self
                    .devices
                    .iter()
                    .any(|device| !device.away && (device.number == *number || device.name == *name));
                if !taken {
                    self.made += 1;
                    self.devices.push(Device {
                        name: *name,
                        number: *number,
                        which: self.made,
                        up: false,
                        away: false,
                    });
                    self.pending.touched.insert(*number);
                }
            }
            Event::Delete(name) => {
                if let Some(at) = self.here(*name) {
                    // The socket's memberships stay with the kernel, and the links stay with the
                    // daemon.
                    self.pending.gone.insert(self.devices.remove(at).number);
                }
            }
            // It keeps its identity, index, membership and program.
            Event::Rename { from, to } => {
                if let (Some(at), None) = (self.here(*from), self.here(*to)) {
                    self.devices[at].name = *to;
                    self.pending.touched.insert(self.devices[at].number);
                }
            }
            // Deleted, as this namespace sees it; but the program stays on it.
            Event::Move(name) => {
                if let Some(at) = self.here(*name) {
                    (self.devices[at].away, self.devices[at].up) = (true, false);
                    self.pending.gone.insert(self.devices[at].number);
                }
            }
            Event::Back(name) => {
                let at = self.devices.iter().position(|device| device.name == *name && device.away);
                if let (Some(at), None) = (at, self.here(*name)) {
                    let free =
                        |number: &u32| !self.devices.iter().any(|device| !device.away && device.number == *number);
                    if let Some(number) = [self.devices[at].number, 9, 10, 11].into_iter().find(free) {
                        (self.devices[at].away, self.devices[at].number) = (false, number);
                        self.pending.touched.insert(number);
                    }
                }
            }
            Event::Switch(name, up) => {
                if let Some(at) = self.here(*name) {
                    self.devices[at].up = *up;
                    self.pending.touched.insert(self.devices[at].number);
                }
            }
            Event::Occupy(occupied) => self.occupied = *occupied,
            Event::Fill(full) => self.full = *full,
            Event::Vlans(vlans) => {
                self.vlans = *vlans;
                self.pending.touched.extend(self.devices.iter().map(|device| device.number));
            }
            // Somebody detaches a link: its interface is 0 then.
            Event::TakeOff => self.links.iter_mut().take(1).for_each(|(_, which, _)| *which = 0),
            Event::LoseMessages => self.pending = Changes::everything(),
            Event::Look | Event::LookAgain => {}
        }
    }

    fn there(&self) -> Vec<Present> {
        let wanted = |device: &&Device| !device.away && if self.named { device.name == 0 } else { device.up };
        let wanted = self.devices.iter().filter(wanted);
        wanted
            .map(|device| {
                let name = format!("virbr{}", device.name);
                Present { interface: Interface { name, index: device.number }, up: device.up }
            })
            .collect()
    }

    /// Which one has this number now.
    fn which(&self, number: u32) -> Option<u32> {
        self.devices.iter().find(|device| !device.away && device.number == number).map(|device| device.which)
    }

    fn look(&mut self, listening: &mut Listening, again: bool) {
        let there = self.there();
        let changes = std::mem::take(&mut self.pending);
        // The listener's question: which links it has, and which interface each is on.
        let spoilt = listening
            .attached_to()
            .into_iter()
            .filter(|on| there.iter().any(|there| there.interface.index == on.index) && !changes.ended(on.index))
            .filter(|on| {
                !self.links.iter().any(|(number, which, _)| *number == on.index && Some(*which) == self.which(on.index))
            })
            .map(|on| (on.index, Refusal { reason: "taken off".to_owned(), ends: Ends::Silently }))
            .collect();
        for command in listening.look(&Now { there: &there, changes: &changes, spoilt: &spoilt, again }) {
            match command {
                Command::Leave(number) => {
                    let before = self.members.len();
                    self.members.retain(|(member, _)| *member != number);
                    assert_eq!(self.members.len() + 1, before, "left what was not joined");
                }
                Command::Join(interface) => {
                    let which = self.which(interface.index).expect("joins what is there");
                    assert!(!self.members.iter().any(|(number, _)| *number == interface.index), "EADDRINUSE");
                    let result = if self.full { Err("full".to_owned()) } else { Ok(()) };
                    if result.is_ok() {
                        self.members.push((interface.index, which));
                    }
                    listening.joined(interface.index, result);
                }
                Command::Detach(number) => {
                    let before = self.links.len();
                    self.links.retain(|(link, ..)| *link != number);
                    assert_eq!(self.links.len() + 1, before, "detached what was not attached");
                }
                Command::Attach(interface) => {
                    let which = self.which(interface.index).expect("attaches to what is there");
                    let there = self.links.iter().position(|(number, ..)| *number == interface.index);
                    if let Some(there) = there {
                        assert_eq!(self.links[there].1, which, "attached twice");
                    }
                    let is_best = there.is_some_and(|there| self.links[there].2);
                    let second_best = match (self.vlans, is_best, self.occupied) {
                        (true, ..) => Some(Refusal { reason: "VLANs".to_owned(), ends: Ends::WithAChange }),
                        (false, false, 1..) => Some(occupied()),
                        (false, ..) => None,
                    };
                    let result = if there.is_none() && self.occupied > 1 {
                        Err(occupied())
                    } else {
                        self.links.retain(|(link, ..)| *link != interface.index);
                        self.links.push((interface.index, which, second_best.is_none()));
                        let mode = if second_best.is_none() { AttachedMode::Native } else { AttachedMode::Tcx };
                        Ok(Attached { mode, second_best })
                    };
                    listening.attached(interface.index, result);
                }
            }
        }
        let _ = listening.tell();
    }
}

proptest! {
    /// Whatever happens, however rarely the listener looks, and whenever the program comes, in the
    /// end: the wanted interfaces are joined, and only they; the program is on each of them, in the
    /// best way, and nowhere else; and each log line is true.
    #[test]
    fn in_the_end_it_listens_on_all_wanted_interfaces(
        named in any::<bool>(),
        events in prop::collection::vec(event(), 0..80),
        program in prop::option::of(0..80_usize),
    ) {
        let mut kernel = Kernel { named, ..Kernel::default() };
        let mut listening = Listening::new(named.then(|| NAME.to_owned()), program.is_none());
        for (number, event) in events.iter().enumerate() {
            if program == Some(number) {
                listening.bring_program();
            }
            kernel.happen(event);
            match event {
                Event::Look => kernel.look(&mut listening, false),
                Event::LookAgain => kernel.look(&mut listening, true),
                Event::Make { .. }
                | Event::Delete(_)
                | Event::Rename { .. }
                | Event::Move(_)
                | Event::Back(_)
                | Event::Switch(..)
                | Event::Occupy(_)
                | Event::Fill(_)
                | Event::Vlans(_)
                | Event::TakeOff
                | Event::LoseMessages => {}
            }
        }
        kernel.happen(&Event::Fill(false));
        kernel.happen(&Event::Occupy(0));
        kernel.happen(&Event::Vlans(false));
        if program.is_some_and(|number| number >= events.len()) {
            listening.bring_program();
        }
        kernel.look(&mut listening, false);
        if listening.is_unfinished() {
            kernel.look(&mut listening, true);
        }
        prop_assert!(!listening.is_unfinished());
        let there = kernel.there();
        let number = |there: &Present| there.interface.index;
        let mut wanted: Vec<_> = there.iter().map(|there| (number(there), kernel.which(number(there)).unwrap())).collect();
        wanted.sort_unstable();
        kernel.members.sort_unstable();
        prop_assert_eq!(&kernel.members, &wanted);
        let mut links: Vec<_> = kernel.links.iter().map(|(number, which, _)| (*number, *which)).collect();
        links.sort_unstable();
        prop_assert_eq!(&links, &wanted);
        prop_assert!(kernel.links.iter().all(|(.., best)| *best));
        prop_assert_eq!(listening.hears(), there.iter().any(|there| there.up));
        let mut places: Vec<_> = there.iter().filter(|there| there.up).map(|there| there.interface.clone()).collect();
        places.sort_unstable_by_key(|interface| interface.index);
        let told = listening.heard_interfaces();
        prop_assert!(told.iter().all(|place| place.mode == Some(AttachedMode::Native) && place.reason.is_none()));
        prop_assert_eq!(told.into_iter().map(|place| place.interface).collect::<Vec<_>>(), places);
    }
}
