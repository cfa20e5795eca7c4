//! What must never be seen of a cluster: success while the victim lives, and the service twice.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use fence_common::wire::Op;

use crate::witness::Witness;

/// A request that a node waits for an answer of.
#[derive(Debug)]
struct Open {
    by: usize,
    op: Op,
    /// What ran under the domain's name when it was asked for.
    victim: Option<Arc<Witness>>,
}

fn is_fence(op: Op) -> bool {
    matches!(op, Op::Off | Op::Reboot)
}

/// Who runs the service.
#[derive(Debug)]
struct Runner {
    node: usize,
    /// The instance of the node that it started in; `None` if that was gone when the start was
    /// read.
    instance: Option<Arc<Witness>>,
}

/// The observer's memory.
#[derive(Debug, Default)]
pub(super) struct Judge {
    open: Vec<Open>,
    runner: Option<Runner>,
    deaths: Vec<(u32, Duration)>,
}

impl Judge {
    /// Earlier records are history. Only the current holder of the service counts.
    pub(super) fn begin(&mut self) {
        self.deaths.clear();
    }

    pub(super) fn asked(&mut self, by: usize, op: Op, victim: Option<Arc<Witness>>) {
        // A `devstatus` beside a fence has its own answer. Otherwise the answer is to the last
        // request.
        self.open.retain(|open| open.by != by || (is_fence(open.op) && !is_fence(op)));
        self.open.push(Open { by, op, victim });
    }

    /// To be called in the moment that the reply is seen.
    pub(super) fn replied(&mut self, to: usize, byte: u8) -> Result<Option<String>> {
        let of_his = |open: &Open| open.by == to;
        let Some(first) = self.open.iter().position(of_his) else { return Ok(None) };
        let Open { op, victim, .. } = &self.open[first];
        let breach = match victim {
            Some(victim) if byte == 0 && is_fence(*op) && !victim.dies_within(Duration::ZERO)? => Some(format!(
                "FALSE SUCCESS: {} was answered with success, and there lives {}",
                op.name(),
                victim.describe()
            )),
            _ => None,
        };
        // Which of the two was answered is not to be seen.
        let look = self.open.iter().position(|open| of_his(open) && !is_fence(open.op)).filter(|_| breach.is_some());
        self.open.remove(look.unwrap_or(first));
        Ok(breach.filter(|_| look.is_none()))
    }

    pub(super) fn died(&mut self, witness: &Witness, at: Duration) {
        self.deaths.push((witness.pid, at));
    }

    /// What the service wrote; `at` is its own word for when. `alive` are the nodes' instances.
    pub(super) fn service(
        &mut self,
        word: &str,
        node: usize,
        at: Duration,
        alive: &[Option<Arc<Witness>>],
    ) -> Option<String> {
        match word {
            "start" => {
                let before = self.runner.replace(Runner { node, instance: alive.get(node).cloned().flatten() })?;
                let instance = before.instance?;
                let is_same =
                    before.node == node && self.runner.as_ref().is_some_and(|runner| is_same(runner, &instance));
                if is_same {
                    // Its process ended on a node that lives, as the storage's lock says.
                    return None;
                }
                if !instance.dies_within(Duration::ZERO).unwrap_or(false) {
                    return Some(format!(
                        "TWICE: the service starts while its last runner lives: {}",
                        instance.describe()
                    ));
                }
                let death = self.deaths.iter().find(|(pid, _)| *pid == instance.pid);
                let early = death.is_some_and(|(_, death)| *death > at);
                early
                    .then(|| format!("TWICE: the service started at {at:?}, and its last runner died later: {death:?}"))
            }
            "stop" => {
                self.runner = None;
                None
            }
            _ => Some(format!("TWICE: the service was to start on node {node} while it runs somewhere")),
        }
    }
}

fn is_same(runner: &Runner, instance: &Arc<Witness>) -> bool {
    runner.instance.as_ref().is_some_and(|now| now.pid == instance.pid)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// Two processes that stand for nodes.
    fn nodes() -> ([Child; 2], Vec<Option<Arc<Witness>>>) {
        let children = [(); 2].map(|()| Command::new("sleep").arg("60").spawn().unwrap());
        let witnesses = children.iter().map(|child| Some(Arc::new(Witness::of_pid(child.id()).unwrap()))).collect();
        (children, witnesses)
    }

    fn end(child: &mut Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_service_may_start_elsewhere_only_after_a_death() {
        let (mut children, nodes) = nodes();
        let mut judge = Judge::default();
        assert_eq!(judge.service("start", 0, SECOND, &nodes), None);
        let twice = judge.service("start", 1, 2 * SECOND, &nodes).unwrap();
        assert!(twice.starts_with("TWICE"), "{twice}");

        let mut judge = Judge::default();
        assert_eq!(judge.service("start", 0, SECOND, &nodes), None);
        end(&mut children[0]);
        judge.died(nodes[0].as_ref().unwrap(), 3 * SECOND);
        // By its own word it started before the death, which was only seen earlier than the word.
        assert!(judge.service("start", 1, 2 * SECOND, &nodes).unwrap().contains("died later"));

        let mut judge = Judge::default();
        assert_eq!(judge.service("start", 0, SECOND, &nodes), None);
        judge.died(nodes[0].as_ref().unwrap(), 3 * SECOND);
        assert_eq!(judge.service("start", 1, 4 * SECOND, &nodes), None);
        end(&mut children[1]);
    }

    #[test]
    fn a_stop_in_order_and_a_start_on_the_same_node_are_no_breach_and_a_refusal_is() {
        let (mut children, nodes) = nodes();
        let mut judge = Judge::default();
        for (word, node) in [("start", 0), ("stop", 0), ("start", 1), ("start", 1)] {
            assert_eq!(judge.service(word, node, SECOND, &nodes), None, "{word} {node}");
        }
        assert!(judge.service("refused", 0, SECOND, &nodes).unwrap().starts_with("TWICE"));
        children.iter_mut().for_each(end);
    }

    #[test]
    fn success_is_false_while_the_victim_lives() {
        let (mut children, nodes) = nodes();
        let victim = || nodes[0].clone();
        let mut judge = Judge::default();
        judge.asked(1, Op::Off, victim());
        assert!(judge.replied(1, 0).unwrap().unwrap().starts_with("FALSE SUCCESS"));
        // A failure is no success. Neither is an answer to another question, or to another client.
        judge.asked(1, Op::Off, victim());
        assert_eq!(judge.replied(1, 1).unwrap(), None);
        judge.asked(1, Op::Status, victim());
        assert_eq!(judge.replied(1, 0).unwrap(), None);
        // A look beside it has its own answer, once.
        judge.asked(1, Op::Off, victim());
        judge.asked(1, Op::DevStatus, None);
        assert_eq!(judge.replied(1, 0).unwrap(), None);
        assert!(judge.replied(1, 0).unwrap().unwrap().starts_with("FALSE SUCCESS"));
        judge.asked(1, Op::Off, victim());
        assert_eq!(judge.replied(0, 0).unwrap(), None);
        end(&mut children[0]);
        assert_eq!(judge.replied(1, 0).unwrap(), None);
        end(&mut children[1]);
    }
}
