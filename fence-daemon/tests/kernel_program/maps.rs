//! The program's maps keep the promised number of entries on any number of CPUs.

use fence_common::rate_limit::{Sender, TRUSTED_MAX};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::bench::load;

fn sender(number: usize) -> Sender {
    let mut ip = [0; 16];
    ip[..4].copy_from_slice(&u32::try_from(number).unwrap().to_be_bytes());
    Sender { ip, mac: [2; 6], family: 2 }
}

/// The kernel gives free elements to each CPU in batches. A CPU without free elements evicts old
/// ones.
#[test]
fn as_many_senders_are_trusted_as_is_promised_whichever_cpu_has_seen_them() {
    let mut program = load();
    let mut memory = program.take_memory().unwrap().unwrap();
    let mine = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| mine.is_set(cpu).unwrap()).collect();
    let on = |cpu: usize| {
        let mut one = CpuSet::new();
        one.set(cpu).unwrap();
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
    };
    // Each CPU has seen one sender, and the first CPU all the others.
    for (number, &cpu) in cpus.iter().enumerate().rev() {
        on(cpu);
        memory.trust(&sender(number), 1);
    }
    for number in cpus.len()..TRUSTED_MAX {
        memory.trust(&sender(number), 1);
    }
    let forgotten = (0..TRUSTED_MAX).filter(|&number| !memory.trusts(&sender(number))).count();
    assert_eq!(forgotten, 0, "of {TRUSTED_MAX} on {} CPUs", cpus.len());
}

/// What one program knows of a sender counts at the others, and what they know stays.
#[test]
fn programs_that_share_their_limits_trust_the_same_senders() {
    let (mut one, mut other, mut alone) = (load(), load(), load());
    other.share_limits(&one.limits().unwrap()).unwrap();
    let [mut of_one, of_other, of_alone] =
        [&mut one, &mut other, &mut alone].map(|program| program.take_memory().unwrap().unwrap());
    of_one.trust(&sender(1), 1);
    assert!(of_other.trusts(&sender(1)) && !of_alone.trusts(&sender(1)));
    drop((of_one, one));
    assert!(of_other.trusts(&sender(1)), "the map has gone with the program that made it");
}
