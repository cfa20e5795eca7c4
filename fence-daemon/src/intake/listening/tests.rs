//! Tests the decisions by themselves, step by step, and against a model of the kernel.

mod model;

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

/// The configured interface. Every command for it succeeds unless told otherwise.
struct Bench {
    listening: Listening,
    refuse: Option<Refusal>,
    /// Why the program is attached in a second-best way, if it is.
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

    fn step(&mut self, there: &[Present], changes: &Changes) -> (Vec<Command>, Vec<InterfaceNews>) {
        self.step_with(&Now { there, changes, spoilt: &BTreeMap::new(), again: false })
    }

    fn again(&mut self, there: &[Present]) -> (Vec<Command>, Vec<InterfaceNews>) {
        self.step_with(&Now { there, changes: &Changes::default(), spoilt: &BTreeMap::new(), again: true })
    }

    fn step_with(&mut self, now: &Now<'_>) -> (Vec<Command>, Vec<InterfaceNews>) {
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

fn nothing() -> (Vec<Command>, Vec<InterfaceNews>) {
    (vec![], vec![])
}

/// The command after a change at number 5, where the program is attached: another way may be better
/// now.
fn look_again() -> Vec<Command> {
    vec![Command::Attach(interface(5))]
}

#[test]
fn another_interface_is_wanted_and_the_end_of_the_old_one_is_no_news() {
    let mut bench = Bench::begun();
    let other = Interface { name: "virbr1".to_owned(), index: 6 };
    bench.listening.want(Some(other.name.clone()));
    let there = [Present { interface: other.clone(), up: true }];
    let commands =
        vec![Command::Detach(5), Command::Leave(5), Command::Join(other.clone()), Command::Attach(other.clone())];
    assert_eq!(bench.step(&there, &Changes::default()), (commands, vec![InterfaceNews::Heard(Again::Came)]));
    assert_eq!(bench.step(&there, &touched(5)), nothing());
    assert_eq!(bench.step(&[], &gone(6)).1, [InterfaceNews::Gone]);
    assert!(bench.listening.status().contains("virbr1"));
}

#[test]
fn a_missing_interface_is_logged_once_at_the_start() {
    let mut bench = Bench::new();
    assert_eq!(bench.step(&[], &Changes::default()), (vec![], vec![InterfaceNews::Missing]));
    assert_eq!(bench.step(&[], &touched(3)), nothing());
    assert!(!bench.listening.hears() && bench.listening.status().contains("waiting"));
    // Being made: it is there, and not up yet.
    let (commands, lines) = bench.step(&[down(5)], &touched(5));
    assert_eq!((commands.len(), lines), (2, vec![]));
    assert!(!bench.listening.hears());
    assert_eq!(bench.step(&[up(5)], &touched(5)), (look_again(), vec![]));
    assert!(bench.listening.hears());
    assert_eq!(bench.listening.status(), "serving virbr0 (xdp generic)");
}

#[test]
fn an_interface_that_is_or_stays_down_is_logged() {
    let mut bench = Bench::new();
    assert_eq!(bench.step(&[down(5)], &Changes::default()).1, [InterfaceNews::Down]);
    let mut bench = Bench::new();
    bench.step(&[], &Changes::default());
    assert_eq!(bench.step(&[down(5)], &touched(5)).1, []);
    assert!(bench.listening.is_unfinished(), "looked at again without a change");
    assert_eq!(bench.again(&[down(5)]), (vec![], vec![InterfaceNews::Down]));
    assert!(!bench.listening.is_unfinished());
}

#[test]
fn a_program_that_comes_later_is_attached_to_what_is_listened_on_and_said_so() {
    let late = || Bench::with(Some(NAME), false);
    let mut bench = late();
    assert_eq!(bench.step(&[up(5)], &Changes::default()), (vec![Command::Join(interface(5))], vec![]));
    bench.listening.bring_program();
    let attached = (vec![Command::Attach(interface(5))], vec![InterfaceNews::Program(AttachedMode::Generic)]);
    assert_eq!(bench.step(&[up(5)], &Changes::default()), attached);
    assert_eq!(bench.step(&[up(5)], &touched(5)), (look_again(), vec![]));

    // The program comes before the interface: as if it had been there from the start.
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
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [InterfaceNews::NoProgram("occupied".to_owned())]);
    assert_eq!(bench.again(&[up(5)]).1, []);
}

#[test]
fn a_gone_interface_is_left_and_a_new_one_joined() {
    let mut bench = Bench::begun();
    assert_eq!(bench.step(&[], &gone(5)), (vec![Command::Detach(5), Command::Leave(5)], vec![InterfaceNews::Gone]));
    assert!(!bench.listening.hears() && bench.listening.attached_to().is_empty());
    let (commands, lines) = bench.step(&[up(7)], &touched(7));
    assert_eq!(commands, [Command::Join(interface(7)), Command::Attach(interface(7))]);
    assert_eq!(lines, [InterfaceNews::Heard(Again::Came)]);
}

#[test]
fn a_deletion_counts_though_the_number_is_there_again() {
    let mut bench = Bench::begun();
    let (commands, lines) = bench.step(&[up(5)], &gone(5));
    let all = [Command::Detach(5), Command::Leave(5), Command::Join(interface(5)), Command::Attach(interface(5))];
    assert_eq!((commands, lines), (all.to_vec(), vec![InterfaceNews::Heard(Again::Recreated)]));
    assert_eq!(bench.step(&[up(5)], &touched(5)), (look_again(), vec![]));
    // Seen between its creation and its being switched on: gone until then.
    assert_eq!(bench.step(&[down(6)], &gone(5)).1, [InterfaceNews::Gone]);
    assert_eq!(bench.step(&[up(6)], &touched(6)).1, [InterfaceNews::Heard(Again::Came)]);
}

#[test]
fn an_interface_that_vanishes_before_the_join_causes_no_error() {
    let mut bench = Bench::begun();
    let now = Now { there: &[up(6)], changes: &gone(5), spoilt: &BTreeMap::new(), again: false };
    let commands = bench.listening.look(&now);
    assert_eq!(commands[2..], [Command::Join(interface(6)), Command::Attach(interface(6))]);
    bench.listening.vanished(6);
    assert_eq!(bench.listening.tell(), [(NAME.to_owned(), InterfaceNews::Gone)]);
    assert!(!bench.listening.hears());
    assert_eq!(bench.step(&[], &gone(6)), nothing());
    assert_eq!(bench.step(&[up(7)], &touched(7)).1, [InterfaceNews::Heard(Again::Came)]);
}

#[test]
fn a_new_interface_with_an_old_name_is_new() {
    let mut bench = Bench::begun();
    // The interface is renamed away, not deleted, and another one takes its name at the same
    // moment.
    let (commands, _) = bench.step(&[up(9)], &touched(9));
    let all = [Command::Detach(5), Command::Leave(5), Command::Join(interface(9)), Command::Attach(interface(9))];
    assert_eq!(commands, all);
}

#[test]
fn lost_messages_redo_everything_and_log_nothing() {
    let mut bench = Bench::begun();
    let (commands, lines) = bench.step(&[up(5)], &Changes::everything());
    let all = [Command::Detach(5), Command::Leave(5), Command::Join(interface(5)), Command::Attach(interface(5))];
    assert_eq!((commands, lines), (all.to_vec(), vec![]));
    assert_eq!(bench.step(&[], &Changes::everything()).1, [InterfaceNews::Gone]);
}

#[test]
fn down_and_up_are_reported_and_change_nothing() {
    let mut bench = Bench::begun();
    assert_eq!(bench.step(&[down(5)], &touched(5)), (look_again(), vec![InterfaceNews::Down]));
    assert!(!bench.listening.hears() && bench.listening.status().contains("down"));
    assert_eq!(bench.step(&[up(5)], &touched(5)), (look_again(), vec![InterfaceNews::Heard(Again::Up)]));
}

#[test]
fn a_membership_that_is_refused_is_tried_at_each_look_and_told_once() {
    let mut bench = Bench { deaf: Some("too many"), ..Bench::new() };
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [InterfaceNews::Deaf("too many".to_owned())]);
    assert!(!bench.listening.hears() && bench.listening.is_unfinished());
    assert!(bench.listening.status().contains("too many"));
    assert_eq!(bench.again(&[up(5)]), (vec![Command::Join(interface(5))], vec![]));
    assert_eq!(bench.step(&[], &gone(5)).0, [Command::Detach(5)], "what was not joined is not left");
    let mut bench = Bench { deaf: Some("too many"), ..Bench::begun() };
    bench.step(&[up(5)], &gone(5));
    bench.deaf = None;
    assert_eq!(bench.again(&[up(5)]), (vec![Command::Join(interface(5))], vec![InterfaceNews::Heard(Again::Joined)]));
    assert!(!bench.listening.is_unfinished());
}

#[test]
fn a_program_that_is_refused_is_tried_when_something_changes_there() {
    let mut bench = Bench { refuse: Some(occupied()), ..Bench::new() };
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [InterfaceNews::NoProgram("occupied".to_owned())]);
    assert!(bench.listening.hears() && bench.listening.status().contains("socket"));
    let attach = vec![Command::Attach(interface(5))];
    assert_eq!(bench.step(&[up(5)], &touched(4)), nothing());
    assert_eq!(bench.step(&[up(5)], &touched(5)), (attach.clone(), vec![]));
    assert_eq!(bench.again(&[up(5)]), (attach.clone(), vec![]));
    bench.refuse = Some(Refusal { reason: "another".to_owned(), ends: Ends::WithAChange });
    assert_eq!(bench.again(&[up(5)]).1, [InterfaceNews::NoProgram("another".to_owned())]);
    assert!(!bench.listening.is_unfinished());
    assert_eq!(bench.again(&[up(5)]), nothing());
    bench.refuse = None;
    assert_eq!(bench.step(&[up(5)], &touched(5)), (attach, vec![InterfaceNews::Program(AttachedMode::Generic)]));
}

#[test]
fn a_program_that_is_refused_for_good_is_tried_on_the_next_interface() {
    let mut bench = Bench::new();
    bench.refuse = Some(Refusal { reason: "not permitted".to_owned(), ends: Ends::Never });
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [InterfaceNews::NoProgram("not permitted".to_owned())]);
    assert_eq!((bench.step(&[up(5)], &touched(5)), bench.again(&[up(5)])), (nothing(), nothing()));
    assert!(!bench.listening.is_unfinished());
    assert!(bench.step(&[up(6)], &gone(5)).0.contains(&Command::Attach(interface(6))));
}

#[test]
fn a_failing_program_is_detached_and_not_attached_again_at_once() {
    let mut bench = Bench::begun();
    let spoilt = [(5, occupied())].into();
    let now = Now { there: &[up(5)], changes: &touched(5), spoilt: &spoilt, again: false };
    assert_eq!(
        bench.step_with(&now),
        (vec![Command::Detach(5)], vec![InterfaceNews::NoProgram("occupied".to_owned())])
    );
    assert!(bench.listening.is_unfinished());
    let attach = vec![Command::Attach(interface(5))];
    assert_eq!(bench.again(&[up(5)]), (attach, vec![InterfaceNews::Program(AttachedMode::Generic)]));
}

#[test]
fn a_second_best_attachment_is_logged_and_improved_later() {
    let mut bench = Bench { second_best: Some(occupied()), ..Bench::new() };
    let told = InterfaceNews::SecondBest(AttachedMode::Generic, "occupied".to_owned());
    assert_eq!(bench.step(&[up(5)], &Changes::default()).1, [told]);
    assert!(bench.listening.is_unfinished());
    let attach = vec![Command::Attach(interface(5))];
    assert_eq!(bench.again(&[up(5)]), (attach.clone(), vec![]));
    assert_eq!(bench.step(&[up(5)], &touched(5)), (attach.clone(), vec![]));
    assert_eq!(bench.step(&[up(5)], &touched(4)), nothing());
    bench.second_best = None;
    assert_eq!(bench.again(&[up(5)]), (attach, vec![InterfaceNews::Program(AttachedMode::Generic)]));
    assert!(!bench.listening.is_unfinished());
    assert_eq!(bench.step(&[], &gone(5)).0, [Command::Detach(5), Command::Leave(5)]);
}

#[test]
fn where_vlans_come_and_go_the_way_changes_and_is_logged() {
    let mut bench = Bench::begun();
    let vlans = Refusal { reason: "VLANs".to_owned(), ends: Ends::WithAChange };
    bench.second_best = Some(vlans);
    assert_eq!(bench.again(&[up(5)]), nothing());
    let told = InterfaceNews::SecondBest(AttachedMode::Generic, "VLANs".to_owned());
    assert_eq!(bench.step(&[up(5)], &touched(5)), (look_again(), vec![told]));
    assert!(!bench.listening.is_unfinished());
    assert_eq!(bench.step(&[up(5)], &touched(5)), (look_again(), vec![]));
    bench.second_best = None;
    let told = InterfaceNews::Program(AttachedMode::Generic);
    assert_eq!(bench.step(&[up(5)], &touched(5)), (look_again(), vec![told]));
}

#[test]
fn without_a_name_each_interface_gets_the_program() {
    let mut bench = Bench::with(None, true);
    assert_eq!(bench.step(&[], &Changes::default()), (vec![], vec![InterfaceNews::Missing]));
    assert_eq!(bench.step(&[], &touched(1)), nothing());
    let other = Present { interface: Interface { name: "virbr1".to_owned(), index: 6 }, up: true };
    let there = [up(5), other.clone()];
    let begin = |interface: &Interface| [Command::Join(interface.clone()), Command::Attach(interface.clone())];
    let all = [begin(&interface(5)), begin(&other.interface)].concat();
    assert_eq!(bench.step(&there, &touched(5)), (all, vec![]));
    assert_eq!(bench.listening.status(), "serving virbr0,virbr1 (xdp generic)");
    let end = |index| vec![Command::Detach(index), Command::Leave(index)];
    assert_eq!(bench.step(&there[1..], &gone(5)), (end(5), vec![InterfaceNews::Gone]));
    // If the program cannot be attached the socket hears, and each interface has its own line.
    bench.refuse = Some(occupied());
    let said = [InterfaceNews::Heard(Again::Came), InterfaceNews::NoProgram("occupied".to_owned())];
    assert_eq!(bench.step(&there, &touched(5)).1, said);
    assert_eq!(bench.listening.status(), "serving virbr0 (through the socket), virbr1 (xdp generic)");
    assert_eq!(
        (bench.listening.mode_on("virbr0"), bench.listening.mode_on("virbr1")),
        (None, Some(AttachedMode::Generic))
    );
    let reasons: Vec<_> = bench.listening.heard_interfaces().into_iter().map(|place| place.reason).collect();
    assert_eq!(reasons, [Some("occupied".to_owned()), None]);
    // A failure on one interface says nothing about the other.
    let spoilt = [(6, occupied())].into();
    let now = Now { there: &there, changes: &Changes::default(), spoilt: &spoilt, again: false };
    assert_eq!(
        bench.step_with(&now),
        (vec![Command::Detach(6)], vec![InterfaceNews::NoProgram("occupied".to_owned())])
    );
    bench.refuse = None;
    let both = there.iter().map(|there| Command::Attach(there.interface.clone())).collect();
    assert_eq!(bench.again(&there), (both, vec![InterfaceNews::Program(AttachedMode::Generic); 2]));
    // One that gets another name stays what it is.
    let renamed = Present { interface: Interface { name: "virbr2".to_owned(), index: 6 }, up: true };
    assert_eq!(bench.step(&[up(5), renamed.clone()], &touched(6)).0, [Command::Attach(renamed.interface)]);
    assert_eq!(bench.listening.mode_on("virbr2"), Some(AttachedMode::Generic));
    assert_eq!(bench.step(&[], &gone(5)).0, [end(5), end(6)].concat());
    assert!(bench.listening.status().contains("waiting"));
}
