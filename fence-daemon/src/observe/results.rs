//! How many requests ended in which way, by listener and operation.

use fence_common::ending::Ending;
use fence_common::wire::Op;

use super::requests::OPS;
use crate::clock::Moment;

/// How many requests of one operation ended in one way, by one listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultTally {
    /// The kind of listener.
    pub kind: &'static str,
    /// The name of its section, if it has one.
    pub name: Option<String>,
    /// The operation.
    pub op: Op,
    /// The end.
    pub ending: Ending,
    /// How many.
    pub count: u64,
}

/// The counts since the start. They have as many listeners as the configuration.
#[derive(Debug, Default)]
pub(super) struct Results {
    came_by: Vec<Listened>,
    /// When each operation succeeded last.
    successes: [Option<Moment>; OPS.len()],
}

/// The requests of one listener.
#[derive(Debug)]
struct Listened {
    kind: &'static str,
    name: Option<String>,
    /// By operation and ending.
    ended: [[u64; Ending::ALL.len()]; OPS.len()],
}

impl Results {
    /// The place of a listener.
    pub(super) fn listener(&mut self, kind: &'static str, name: Option<&str>) -> usize {
        let is_it = |one: &Listened| (one.kind, one.name.as_deref()) == (kind, name);
        self.came_by.iter().position(is_it).unwrap_or_else(|| {
            let ended = [[0; Ending::ALL.len()]; OPS.len()];
            self.came_by.push(Listened { kind, name: name.map(str::to_owned), ended });
            self.came_by.len() - 1
        })
    }

    /// Counts one end, by the listener at this place.
    pub(super) fn count(&mut self, came_by: usize, op: Op, ending: Ending, at: Moment) {
        let Some(of_op) = OPS.iter().position(|known| *known == op) else { return };
        let listener = self.came_by.get_mut(came_by);
        if let Some(count) = listener.and_then(|one| one.ended.get_mut(of_op)?.get_mut(ending as usize)) {
            *count += 1;
        }
        if let Some(last) = self.successes.get_mut(of_op).filter(|_| ending == Ending::Success) {
            *last = Some(at);
        }
    }

    /// The counts that are not zero.
    pub(super) fn counted(&self) -> Vec<ResultTally> {
        let mut all = Vec::new();
        for one in &self.came_by {
            for (op, ended) in OPS.into_iter().zip(&one.ended) {
                let some = Ending::ALL.iter().zip(ended).filter(|(_, count)| **count > 0);
                all.extend(some.map(|(ending, count)| {
                    let (kind, name) = (one.kind, one.name.clone());
                    ResultTally { kind, name, op, ending: *ending, count: *count }
                }));
            }
        }
        all
    }

    /// When each operation succeeded last, of those that did.
    pub(super) fn successes(&self) -> Vec<(Op, Moment)> {
        OPS.into_iter().zip(self.successes).filter_map(|(op, last)| Some((op, last?))).collect()
    }
}
