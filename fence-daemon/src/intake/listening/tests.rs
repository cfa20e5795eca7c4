//! The decisions by themselves, step by step and against a model of the kernel.

use proptest::prelude::*;

use super::*;

const NAME: &str = "virbr0";

fn interface(index: u32) -> Interface {
    Interface { name: NAME.to_owned(), index }
}

fn up(index: u32) -> Present {
    Present { interface: interface(index), up: true }
}

fn down(index: u32) -> Present {
    Present { interface: interface(index), up: false }
}

fn gone(index: u32) -> Changes {
    Changes { gone: [index].into(), touched: [index].into(), ..Changes::default() }
}

fn touched(index: u32) -> Changes {
    Changes { touched: [index].into(), ..Changes::default() }
}

fn occupied() -> Refusal {
    Refusal { reason: "occupied".to_owned(), ends: Ends::Silently }
}

/// The configured interface, with all that is done about it going well unless told otherwise.
struct Bench {
    listening: Listening,
    refuse: Option<Refusal>,
    /// Why the program is attached in a second best way, if it is.
    second_best: Option<Refusal>,
    deaf: Option<&'static str>,
}

impl Bench {
    fn new() -> Self {
        Self::with(Some(NAME), true)
    }

    fn with(name: Option<&str>, program: bool) -> Self {
        let listening = Listening::new(name.map(str::to_owned), program);
        Self { listening, refuse: None, second_best: None, deaf: None }
    }

    /// One that listens on number 5.
    fn begun() -> Self {
        let mut bench = Self::new();
        assert_eq!(
            bench.step(&[up(5)], &Changes::default()),
            ([Command::Join(interface(5)), Command::Attach(interface(5))].to_vec(), vec![])
        );
        assert!(bench.listening.hears());
        bench
    }

    fn step(&mut self, there: &[Present], changes: &Changes) -> (Vec<Command>, Vec<Line>) {
        self.step_with(&Now { there, changes, spoilt: &BTreeMap::new(), again: false })
    }

    fn again(&mut self, there: &[Present]) -> (Vec<Command>, Vec<Line>) {
        self.step_with(&Now { there, changes: &Changes::default(), spoilt: &BTreeMap::new(), again: true })
    }

    fn step_with(&mut self, now: &Now<'_>) -> (Vec<Command>, Vec<Line>) {
        let commands = self.listening.look(now);
        for command in &commands {
            match command {
                Command::Join(interface) => {
                    let result = self.deaf.map_or(Ok(()), |why| Err(why.to_owned()));
                    self.listening.joined(interface.index, result);
                }
                Command::Attach(interface) => {
                    let attached = Attached { mode: AttachedMode::Generic, second_best: self.second_best.clone() };
                    let result = self.refuse.clone().map_or(Ok(attached), Err);
                    self.listening.attached(interface.index, result);
                }
                Command::Detach(_) | Command::Leave(_) => {}
            }
        }
        (commands, self.listening.tell().into_iter().map(|(_, line)| line).collect())
    }
}

fn nothing() -> (Vec<Command>, Vec<Line>) {
    (vec![], vec![])
}

#[test]
fn what_is_missing_at_the_start_is_told_once_and_its_coming_by_others() {
    let mut bench = Bench::new();
    assert_eq!(bench.step(&[], &Changes::default()), (vec![], vec![Line::Missing]));
    assert_eq!(bench.step(&[], &touched(3)), nothing());
    assert!(!bench.listening.hears() && bench.listening.status().contains("waiting"));
    // Being made: it is there, and not up yet.
    let (commands, lines) = bench.step(&[down(5)], &touched(5));
    assert_eq!((commands.len(), lines), (2, vec![]));
    assert!(!bench.listening.hears());
    assert_eq!(bench.step(&[up(5)], &touched(5)), nothing());
    assert!(bench.listening.hears());
    assert_eq!(bench.listening.status(), "serving virbr0 (xdp generic)");
}

#[test]
fn what_is_down_at_the_start_or_stays_down_is_told() {
    let mut bench = Bench::new();
    assert_eq!(bench.step(&[down(5)], &Changes::default()).1, [Line::Down]);
    let mut bench = Bench::new();
    bench.step(&[], &Changes::default());
    assert_eq!(bench.step(&[down(5)], &touched(5)).1, []);
    assert!(bench.listening.is_unfinished(), "looked at again without a change");
    assert_eq!(bench.again(&[down(5)]), (vec![], vec![Line::Down]));
    assert!(!bench.listening.is_unfinished());
}

#[test]
fn a_program_that_comes_later_is_attached_to_what_is_listened_on_and_said_so() {
    let late = || Bench::with(Some(NAME), false);
    let mut bench = late();
    assert_eq!(bench.step(&[up(5)], &Changes::default()), (vec![Command::Join(interface(5))], vec![]));
    bench.listening.bring_program();
    let attached = (vec![Command::Attach(interface(5))], vec![Line::Program(AttachedMode::Generic)]);
    assert_eq!(bench.step(&[up(5)], &Changes::default()), attached);
    assert_eq!(bench.step(&[up(5)], &touched(5)), nothing());

    // Before the interface: as if it had been there from the start.
    let mut bench = late();
    bench.step(&[], &Changes::default());
    bench.listening.bring_program();
    assert_eq!(bench.step(&[], &Changes::default()), nothing());
    let (commands, lines) = bench.step(&[up(5)], &touched(5));
    assert_eq!((commands, lines), (vec![Command::Join(interface(5)), Command::Attach(interface(5))], vec![]));

    // Refused: why is said, once.
    let mut bench = late();
    bench.step(&[up(5)], &Changes::default());
    bench.listening.bring_program();
    bench.refuse = Some(occupied());
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [Line::NoProgram("occupied".to_owned())]);
    assert_eq!(bench.again(&[up(5)]).1, []);
}

#[test]
fn what_goes_is_left_and_what_comes_is_joined() {
    let mut bench = Bench::begun();
    assert_eq!(bench.step(&[], &gone(5)), (vec![Command::Detach(5), Command::Leave(5)], vec![Line::Gone]));
    assert!(!bench.listening.hears() && bench.listening.attached_to().is_empty());
    let (commands, lines) = bench.step(&[up(7)], &touched(7));
    assert_eq!(commands, [Command::Join(interface(7)), Command::Attach(interface(7))]);
    assert_eq!(lines, [Line::Heard(Again::Came)]);
}

#[test]
fn a_deletion_counts_though_the_number_is_there_again() {
    let mut bench = Bench::begun();
    let (commands, lines) = bench.step(&[up(5)], &gone(5));
    let all = [Command::Detach(5), Command::Leave(5), Command::Join(interface(5)), Command::Attach(interface(5))];
    assert_eq!((commands, lines), (all.to_vec(), vec![Line::Heard(Again::MadeAnew)]));
    assert_eq!(bench.step(&[up(5)], &touched(5)), nothing());
    // Seen between its making and its being switched on: gone until then.
    assert_eq!(bench.step(&[down(6)], &gone(5)).1, [Line::Gone]);
    assert_eq!(bench.step(&[up(6)], &touched(6)), (vec![], vec![Line::Heard(Again::Came)]));
}

#[test]
fn what_vanishes_before_it_is_joined_is_gone_without_a_complaint() {
    let mut bench = Bench::begun();
    let now = Now { there: &[up(6)], changes: &gone(5), spoilt: &BTreeMap::new(), again: false };
    let commands = bench.listening.look(&now);
    assert_eq!(commands[2..], [Command::Join(interface(6)), Command::Attach(interface(6))]);
    bench.listening.vanished(6);
    assert_eq!(bench.listening.tell(), [(NAME.to_owned(), Line::Gone)]);
    assert!(!bench.listening.hears());
    assert_eq!(bench.step(&[], &gone(6)), nothing());
    assert_eq!(bench.step(&[up(7)], &touched(7)).1, [Line::Heard(Again::Came)]);
}

#[test]
fn another_with_the_name_is_another() {
    let mut bench = Bench::begun();
    // Renamed away, nothing deleted; and another one renamed onto it in the same moment.
    let (commands, _) = bench.step(&[up(9)], &touched(9));
    let all = [Command::Detach(5), Command::Leave(5), Command::Join(interface(9)), Command::Attach(interface(9))];
    assert_eq!(commands, all);
}

#[test]
fn after_lost_messages_everything_is_done_anew_and_nothing_told() {
    let mut bench = Bench::begun();
    let (commands, lines) = bench.step(&[up(5)], &Changes::everything());
    let all = [Command::Detach(5), Command::Leave(5), Command::Join(interface(5)), Command::Attach(interface(5))];
    assert_eq!((commands, lines), (all.to_vec(), vec![]));
    assert_eq!(bench.step(&[], &Changes::everything()).1, [Line::Gone]);
}

#[test]
fn down_and_up_are_told_and_change_nothing() {
    let mut bench = Bench::begun();
    assert_eq!(bench.step(&[down(5)], &touched(5)), (vec![], vec![Line::Down]));
    assert!(!bench.listening.hears() && bench.listening.status().contains("down"));
    assert_eq!(bench.step(&[up(5)], &touched(5)), (vec![], vec![Line::Heard(Again::Up)]));
}

#[test]
fn a_membership_that_is_refused_is_tried_at_each_look_and_told_once() {
    let mut bench = Bench { deaf: Some("too many"), ..Bench::new() };
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [Line::Deaf("too many".to_owned())]);
    assert!(!bench.listening.hears() && bench.listening.is_unfinished());
    assert!(bench.listening.status().contains("too many"));
    assert_eq!(bench.again(&[up(5)]), (vec![Command::Join(interface(5))], vec![]));
    assert_eq!(bench.step(&[], &gone(5)).0, [Command::Detach(5)], "what was not joined is not left");
    let mut bench = Bench { deaf: Some("too many"), ..Bench::begun() };
    bench.step(&[up(5)], &gone(5));
    bench.deaf = None;
    assert_eq!(bench.again(&[up(5)]), (vec![Command::Join(interface(5))], vec![Line::Heard(Again::Joined)]));
    assert!(!bench.listening.is_unfinished());
}

#[test]
fn a_program_that_is_refused_is_tried_when_something_changes_there() {
    let mut bench = Bench { refuse: Some(occupied()), ..Bench::new() };
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [Line::NoProgram("occupied".to_owned())]);
    assert!(bench.listening.hears() && bench.listening.status().contains("socket"));
    let attach = vec![Command::Attach(interface(5))];
    assert_eq!(bench.step(&[up(5)], &touched(4)), nothing());
    assert_eq!(bench.step(&[up(5)], &touched(5)), (attach.clone(), vec![]));
    assert_eq!(bench.again(&[up(5)]), (attach.clone(), vec![]));
    bench.refuse = Some(Refusal { reason: "another".to_owned(), ends: Ends::WithAChange });
    assert_eq!(bench.again(&[up(5)]).1, [Line::NoProgram("another".to_owned())]);
    assert!(!bench.listening.is_unfinished());
    assert_eq!(bench.again(&[up(5)]), nothing());
    bench.refuse = None;
    assert_eq!(bench.step(&[up(5)], &touched(5)), (attach, vec![Line::Program(AttachedMode::Generic)]));
}

#[test]
fn a_program_that_is_refused_for_good_is_tried_on_the_next_interface() {
    let mut bench = Bench::new();
    bench.refuse = Some(Refusal { reason: "not permitted".to_owned(), ends: Ends::Never });
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [Line::NoProgram("not permitted".to_owned())]);
    assert_eq!((bench.step(&[up(5)], &touched(5)), bench.again(&[up(5)])), (nothing(), nothing()));
    assert!(!bench.listening.is_unfinished());
    assert!(bench.step(&[up(6)], &gone(5)).0.contains(&Command::Attach(interface(6))));
}

#[test]
fn a_program_that_is_spoilt_goes_and_is_not_put_back_at_once() {
    let mut bench = Bench::begun();
    let spoilt = [(5, occupied())].into();
    let now = Now { there: &[up(5)], changes: &touched(5), spoilt: &spoilt, again: false };
    assert_eq!(bench.step_with(&now), (vec![Command::Detach(5)], vec![Line::NoProgram("occupied".to_owned())]));
    assert!(bench.listening.is_unfinished());
    let attach = vec![Command::Attach(interface(5))];
    assert_eq!(bench.again(&[up(5)]), (attach, vec![Line::Program(AttachedMode::Generic)]));
}

#[test]
fn what_is_second_best_is_told_and_bettered_when_that_can_be() {
    let mut bench = Bench { second_best: Some(occupied()), ..Bench::new() };
    let told = Line::SecondBest(AttachedMode::Generic, "occupied".to_owned());
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [told]);
    assert!(bench.listening.is_unfinished());
    let attach = vec![Command::Attach(interface(5))];
    assert_eq!(bench.again(&[up(5)]), (attach.clone(), vec![]));
    assert_eq!(bench.step(&[up(5)], &touched(5)), (attach.clone(), vec![]));
    assert_eq!(bench.step(&[up(5)], &touched(4)), nothing());
    bench.second_best = None;
    assert_eq!(bench.again(&[up(5)]), (attach, vec![Line::Program(AttachedMode::Generic)]));
    assert!(!bench.listening.is_unfinished());
    assert_eq!(bench.step(&[], &gone(5)).0, [Command::Detach(5), Command::Leave(5)]);
}

#[test]
fn without_a_name_all_are_joined_and_each_gets_the_program() {
    let mut bench = Bench::with(None, true);
    assert_eq!(bench.step(&[], &Changes::default()), (vec![], vec![Line::Missing]));
    assert_eq!(bench.step(&[], &touched(1)), nothing());
    let other = Present { interface: Interface { name: "virbr1".to_owned(), index: 6 }, up: true };
    let there = [up(5), other.clone()];
    let begin = |interface: &Interface| [Command::Join(interface.clone()), Command::Attach(interface.clone())];
    let all = [begin(&interface(5)), begin(&other.interface)].concat();
    assert_eq!(bench.step(&there, &touched(5)), (all, vec![]));
    assert_eq!(bench.listening.status(), "serving virbr0,virbr1 (xdp generic)");
    let end = |index| vec![Command::Detach(index), Command::Leave(index)];
    assert_eq!(bench.step(&there[1..], &gone(5)), (end(5), vec![Line::Gone]));
    // Where it cannot be attached the socket hears, and what is said is said of each.
    bench.refuse = Some(occupied());
    let said = [Line::Heard(Again::Came), Line::NoProgram("occupied".to_owned())];
    assert_eq!(bench.step(&there, &touched(5)).1, said);
    assert_eq!(bench.listening.status(), "serving virbr0 (through the socket), virbr1 (xdp generic)");
    assert_eq!(
        (bench.listening.mode_on("virbr0"), bench.listening.mode_on("virbr1")),
        (None, Some(AttachedMode::Generic))
    );
    let reasons: Vec<_> = bench.listening.places().into_iter().map(|place| place.reason).collect();
    assert_eq!(reasons, [Some("occupied".to_owned()), None]);
    // What is spoilt on one says nothing about the other.
    let spoilt = [(6, occupied())].into();
    let now = Now { there: &there, changes: &Changes::default(), spoilt: &spoilt, again: false };
    assert_eq!(bench.step_with(&now), (vec![Command::Detach(6)], vec![Line::NoProgram("occupied".to_owned())]));
    bench.refuse = None;
    let both = there.iter().map(|there| Command::Attach(there.interface.clone())).collect();
    assert_eq!(bench.again(&there), (both, vec![Line::Program(AttachedMode::Generic); 2]));
    // One that gets another name stays what it is.
    let renamed = Present { interface: Interface { name: "virbr2".to_owned(), index: 6 }, up: true };
    assert_eq!(bench.step(&[up(5), renamed], &touched(6)).0, []);
    assert_eq!(bench.listening.mode_on("virbr2"), Some(AttachedMode::Generic));
    assert_eq!(bench.step(&[], &gone(5)).0, [end(5), end(6)].concat());
    assert!(bench.listening.status().contains("waiting"));
}

/// One interface of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Device {
    /// The last digit of its name, `virbr0` and so on.
    name: u32,
    /// The kernel's number for it.
    number: u32,
    /// Which one it is: each that is made is a new one, whatever its name and number.
    which: u32,
    up: bool,
    /// In another namespace.
    away: bool,
}

/// The kernel as far as it matters.
#[derive(Debug, Default)]
struct Kernel {
    /// Whether the interface is named; else all that are up are listened on.
    named: bool,
    devices: Vec<Device>,
    made: u32,
    /// What the socket has joined: number, and which one that was.
    members: Vec<(u32, u32)>,
    /// The program's links: by which number it was made, which one it is on (it may be deleted), and whether in the best way.
    links: Vec<(u32, u32, bool)>,
    /// Another program: 1 lets only a second best way, 2 none.
    occupied: u8,
    full: bool,
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
                    // What the socket has joined stays in its books, and the links stay in ours.
                    self.pending.gone.insert(self.devices.remove(at).number);
                }
            }
            // It stays what it is, with its number, its membership and its program.
            Event::Rename { from, to } => {
                if let (Some(at), None) = (self.here(*from), self.here(*to)) {
                    self.devices[at].name = *to;
                    self.pending.touched.insert(self.devices[at].number);
                }
            }
            // As deleted for who stays behind; but the program stays on it.
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
        // As the listener asks it: what it has a link to, and what that is on.
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
                        let (_, on, best) = self.links[there];
                        assert!(on == which && !best, "attached twice");
                    }
                    let second_best = (self.occupied == 1).then(occupied);
                    let result = match there {
                        // What there is stays where there is nothing better.
                        Some(_) if self.occupied > 0 => {
                            Ok(Attached { mode: AttachedMode::Tcx, second_best: Some(occupied()) })
                        }
                        None if self.occupied > 1 => Err(occupied()),
                        Some(_) | None => {
                            self.links.retain(|(link, ..)| *link != interface.index);
                            self.links.push((interface.index, which, second_best.is_none()));
                            Ok(Attached { mode: AttachedMode::Native, second_best })
                        }
                    };
                    listening.attached(interface.index, result);
                }
            }
        }
        let _ = listening.tell();
    }
}

proptest! {
    /// Whatever happens in between, however seldom it is looked, and whenever the program comes: in the end the interfaces that are wanted are joined, and
    /// they alone; the program is on each of them, in the best way, and nowhere else; and what is said of it is true.
    #[test]
    fn in_the_end_it_listens_on_what_there_is(
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
                | Event::TakeOff
                | Event::LoseMessages => {}
            }
        }
        kernel.happen(&Event::Fill(false));
        kernel.happen(&Event::Occupy(0));
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
        let told = listening.places();
        prop_assert!(told.iter().all(|place| place.mode == Some(AttachedMode::Native) && place.reason.is_none()));
        prop_assert_eq!(told.into_iter().map(|place| place.interface).collect::<Vec<_>>(), places);
    }
}
