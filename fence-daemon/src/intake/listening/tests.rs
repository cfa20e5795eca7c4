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
    Refusal { reason: "occupied".to_owned(), may_end: true }
}

/// The configured interface, with all that is done about it going well unless told otherwise.
struct Bench {
    listening: Listening,
    refuse: Option<Refusal>,
    deaf: Option<&'static str>,
}

impl Bench {
    fn new() -> Self {
        Self { listening: Listening::new(Some(NAME.to_owned()), true), refuse: None, deaf: None }
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
        self.step_with(&Now { there, changes, spoilt: None, again: false })
    }

    fn again(&mut self, there: &[Present]) -> (Vec<Command>, Vec<Line>) {
        self.step_with(&Now { there, changes: &Changes::default(), spoilt: None, again: true })
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
                    let result = self.refuse.clone().map_or(Ok(AttachedMode::Generic), Err);
                    self.listening.attached(interface.index, result);
                }
                Command::Detach | Command::Leave(_) => {}
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
    let late = || Bench { listening: Listening::new(Some(NAME.to_owned()), false), refuse: None, deaf: None };
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
    assert_eq!(bench.step(&[], &gone(5)), (vec![Command::Detach, Command::Leave(5)], vec![Line::Gone]));
    assert!(!bench.listening.hears() && bench.listening.mode().is_none());
    let (commands, lines) = bench.step(&[up(7)], &touched(7));
    assert_eq!(commands, [Command::Join(interface(7)), Command::Attach(interface(7))]);
    assert_eq!(lines, [Line::Heard(Again::Came)]);
}

#[test]
fn a_deletion_counts_though_the_number_is_there_again() {
    let mut bench = Bench::begun();
    let (commands, lines) = bench.step(&[up(5)], &gone(5));
    let all = [Command::Detach, Command::Leave(5), Command::Join(interface(5)), Command::Attach(interface(5))];
    assert_eq!((commands, lines), (all.to_vec(), vec![Line::Heard(Again::MadeAnew)]));
    assert_eq!(bench.step(&[up(5)], &touched(5)), nothing());
    // Seen between its making and its being switched on: gone until then.
    assert_eq!(bench.step(&[down(6)], &gone(5)).1, [Line::Gone]);
    assert_eq!(bench.step(&[up(6)], &touched(6)), (vec![], vec![Line::Heard(Again::Came)]));
}

#[test]
fn what_vanishes_before_it_is_joined_is_gone_without_a_complaint() {
    let mut bench = Bench::begun();
    let now = Now { there: &[up(6)], changes: &gone(5), spoilt: None, again: false };
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
    let all = [Command::Detach, Command::Leave(5), Command::Join(interface(9)), Command::Attach(interface(9))];
    assert_eq!(commands, all);
}

#[test]
fn after_lost_messages_everything_is_done_anew_and_nothing_told() {
    let mut bench = Bench::begun();
    let (commands, lines) = bench.step(&[up(5)], &Changes::everything());
    let all = [Command::Detach, Command::Leave(5), Command::Join(interface(5)), Command::Attach(interface(5))];
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
    assert_eq!(bench.step(&[], &gone(5)).0, [Command::Detach], "what was not joined is not left");
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
    bench.refuse = Some(Refusal { reason: "another".to_owned(), may_end: false });
    assert_eq!(bench.again(&[up(5)]).1, [Line::NoProgram("another".to_owned())]);
    assert!(!bench.listening.is_unfinished());
    assert_eq!(bench.again(&[up(5)]), nothing());
    bench.refuse = None;
    assert_eq!(bench.step(&[up(5)], &touched(5)), (attach, vec![Line::Program(AttachedMode::Generic)]));
}

#[test]
fn a_program_that_is_spoilt_goes_and_is_not_put_back_at_once() {
    let mut bench = Bench::begun();
    let now = Now { there: &[up(5)], changes: &touched(5), spoilt: Some(occupied()), again: false };
    assert_eq!(bench.step_with(&now), (vec![Command::Detach], vec![Line::NoProgram("occupied".to_owned())]));
    assert!(bench.listening.is_unfinished());
    let attach = vec![Command::Attach(interface(5))];
    assert_eq!(bench.again(&[up(5)]), (attach, vec![Line::Program(AttachedMode::Generic)]));
}

#[test]
fn without_a_name_all_are_joined_and_none_gets_the_program() {
    let mut bench = Bench { listening: Listening::new(None, true), refuse: None, deaf: None };
    assert_eq!(bench.step(&[], &Changes::default()), (vec![], vec![Line::Missing]));
    assert_eq!(bench.step(&[], &touched(1)), nothing());
    let other = Present { interface: Interface { name: "virbr1".to_owned(), index: 6 }, up: true };
    let there = [up(5), other.clone()];
    let joins = [Command::Join(interface(5)), Command::Join(other.interface.clone())];
    assert_eq!(bench.step(&there, &touched(5)), (joins.to_vec(), vec![]));
    assert_eq!(bench.listening.names(), "virbr0,virbr1");
    assert_eq!(bench.step(&there[1..], &gone(5)), (vec![Command::Leave(5)], vec![Line::Gone]));
    assert_eq!(bench.step(&there, &touched(5)).1, [Line::Heard(Again::Came)]);
    // One that gets another name stays what it is.
    let renamed = Present { interface: Interface { name: "virbr2".to_owned(), index: 6 }, up: true };
    assert_eq!(bench.step(&[up(5), renamed], &touched(6)).0, []);
    assert_eq!(bench.listening.names(), "virbr0,virbr2");
    assert_eq!(bench.step(&[], &gone(5)).0, [Command::Leave(5), Command::Leave(6)]);
    assert!(bench.listening.status().contains("waiting"));
}

/// The kernel as far as it matters: one interface at most has the name; each that is made is a new one, whatever its number.
#[derive(Debug, Default)]
struct Kernel {
    /// Number, which one it is, and whether it is up.
    there: Option<(u32, u32, bool)>,
    made: u32,
    /// The numbers of those that have another name now.
    elsewhere: Vec<u32>,
    /// What the socket has joined: number, and which one that was.
    members: Vec<(u32, u32)>,
    /// Which one the program is on.
    program: Option<u32>,
    occupied: bool,
    full: bool,
    pending: Changes,
}

#[derive(Clone, Debug)]
enum Event {
    Make(u32),
    Delete,
    RenameAway,
    Switch(bool),
    Occupy(bool),
    Fill(bool),
    LoseMessages,
    Look,
    LookAgain,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (5..9_u32).prop_map(Event::Make),
        2 => Just(Event::Delete),
        1 => Just(Event::RenameAway),
        2 => any::<bool>().prop_map(Event::Switch),
        1 => any::<bool>().prop_map(Event::Occupy),
        1 => any::<bool>().prop_map(Event::Fill),
        1 => Just(Event::LoseMessages),
        4 => Just(Event::Look),
        1 => Just(Event::LookAgain),
    ]
}

impl Kernel {
    fn happen(&mut self, event: &Event) {
        match event {
            Event::Make(number) if self.there.is_none() && !self.elsewhere.contains(number) => {
                self.made += 1;
                self.there = Some((*number, self.made, false));
                self.pending.touched.insert(*number);
            }
            Event::Delete => {
                if let Some((number, which, _)) = self.there.take() {
                    self.pending.gone.insert(number);
                    // The program goes with its interface; what the socket has joined stays in its books.
                    self.program = self.program.filter(|on| *on != which);
                }
            }
            // It stays what it is, with its number, its membership and its program.
            Event::RenameAway => {
                if let Some((number, ..)) = self.there.take() {
                    self.pending.touched.insert(number);
                    self.elsewhere.push(number);
                }
            }
            Event::Switch(up) => {
                if let Some((number, _, is_up)) = &mut self.there {
                    *is_up = *up;
                    self.pending.touched.insert(*number);
                }
            }
            Event::Occupy(occupied) if !(*occupied && self.program.is_some()) => self.occupied = *occupied,
            Event::Fill(full) => self.full = *full,
            Event::LoseMessages => self.pending = Changes::everything(),
            Event::Make(_) | Event::Occupy(_) | Event::Look | Event::LookAgain => {}
        }
    }

    fn look(&mut self, listening: &mut Listening, again: bool) {
        let there: Vec<_> =
            self.there.iter().map(|(number, _, up)| Present { interface: interface(*number), up: *up }).collect();
        let changes = std::mem::take(&mut self.pending);
        for command in listening.look(&Now { there: &there, changes: &changes, spoilt: None, again }) {
            let current = self.there.map(|(number, which, _)| (number, which));
            match command {
                Command::Leave(number) => {
                    let before = self.members.len();
                    self.members.retain(|(member, _)| *member != number);
                    assert_eq!(self.members.len() + 1, before, "left what was not joined");
                }
                Command::Join(interface) => {
                    let current =
                        current.filter(|(number, _)| *number == interface.index).expect("joins what is there");
                    assert!(!self.members.iter().any(|(number, _)| *number == interface.index), "EADDRINUSE");
                    let result = if self.full { Err("full".to_owned()) } else { Ok(()) };
                    if result.is_ok() {
                        self.members.push(current);
                    }
                    listening.joined(interface.index, result);
                }
                Command::Detach => self.program = None,
                Command::Attach(interface) => {
                    assert!(listening.attached_to().is_none(), "attached twice");
                    let result = if self.occupied { Err(occupied()) } else { Ok(AttachedMode::Generic) };
                    if result.is_ok() {
                        self.program = current.map(|(_, which)| which);
                    }
                    listening.attached(interface.index, result);
                }
            }
        }
        let _ = listening.tell();
    }
}

proptest! {
    /// Whatever happens in between, however seldom it is looked, and whenever the program comes: in the end the interface that there is is joined, and it alone; the
    /// program is on it; and what is said of it is true.
    #[test]
    fn in_the_end_it_listens_on_what_there_is(
        events in prop::collection::vec(event(), 0..60),
        program in prop::option::of(0..60_usize),
    ) {
        let (mut kernel, mut listening) = (Kernel::default(), Listening::new(Some(NAME.to_owned()), program.is_none()));
        for (number, event) in events.iter().enumerate() {
            if program == Some(number) {
                listening.bring_program();
            }
            kernel.happen(event);
            match event {
                Event::Look => kernel.look(&mut listening, false),
                Event::LookAgain => kernel.look(&mut listening, true),
                Event::Make(_)
                | Event::Delete
                | Event::RenameAway
                | Event::Switch(_)
                | Event::Occupy(_)
                | Event::Fill(_)
                | Event::LoseMessages => {}
            }
        }
        kernel.happen(&Event::Fill(false));
        kernel.happen(&Event::Occupy(false));
        if program.is_some_and(|number| number >= events.len()) {
            listening.bring_program();
        }
        kernel.look(&mut listening, false);
        if listening.is_unfinished() {
            kernel.look(&mut listening, true);
        }
        prop_assert!(!listening.is_unfinished());
        let current = kernel.there.map(|(number, which, _)| (number, which));
        prop_assert_eq!(&kernel.members, &current.into_iter().collect::<Vec<_>>());
        prop_assert_eq!(kernel.program, current.map(|(_, which)| which));
        prop_assert_eq!(listening.hears(), kernel.there.is_some_and(|(_, _, up)| up));
        prop_assert_eq!(listening.mode().is_some(), current.is_some());
    }
}
