//! Hands every request to the pipeline, from whichever listener, and sends the heartbeats.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use fence_common::rate_limit::STALE_AFTER_NS;
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::warn;

use super::DaemonError;
use super::beat::Beat;
use crate::fault::{self, Point};
use crate::intake::arrivals::Arrivals;
use crate::intake::backlog::Questions;
use crate::intake::request::{Incoming, Verified};
use crate::intake::ring::RequestRing;
use crate::intake::socket::RequestSocket;
use crate::pipeline::Pipeline;
use crate::systemd::Watchdog;

/// How often the daemon sends the heartbeat to the kernel programs: one may come late.
const BEAT: Duration = Duration::from_nanos(STALE_AFTER_NS / 2);

/// Each so many heartbeats the daemon looks at whom it has rejected. A timer of its own would wake
/// an idle daemon once more.
const BEATS_PER_LOOK: u32 = 4;

/// Where requests come from.
pub(super) struct Sources {
    /// The request sockets, by the numbers of their listeners.
    pub(super) sockets: Vec<(usize, Arc<RequestSocket>)>,
    pub(super) rings: Rings,
    pub(super) arrivals: Arrivals,
    pub(super) changes: mpsc::UnboundedReceiver<SourceChange>,
}

/// A change of what is read.
pub(super) enum SourceChange {
    /// Another listener's socket.
    Read(usize, Arc<RequestSocket>),
    /// A listener has ended: what is there is read, and no more.
    Forget(usize),
}

impl Sources {
    /// Carries a change out.
    fn change(&mut self, change: SourceChange, pipeline: &Pipeline) {
        match change {
            SourceChange::Read(number, socket) => self.sockets.push((number, socket)),
            SourceChange::Forget(number) => {
                self.rings.end(number, |request| pipeline.accept(request));
                for (_, socket) in self.sockets.extract_if(.., |(of, _)| *of == number) {
                    socket.take_waiting(|request| pipeline.accept(request));
                }
            }
        }
    }
}

/// The rings of the kernel programs, and those that are being loaded, by the numbers of their
/// listeners.
#[derive(Default)]
pub(super) struct Rings {
    coming: Vec<(usize, oneshot::Receiver<RequestRing>)>,
    there: Vec<(usize, RequestRing)>,
    turn: usize,
}

impl Rings {
    pub(super) fn expected(coming: Vec<(usize, oneshot::Receiver<RequestRing>)>) -> Self {
        Self { coming, ..Self::default() }
    }

    /// The next request of any program. Dropping the future loses none.
    async fn next(&mut self) -> io::Result<Verified> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Verified>> {
        let there = &mut self.there;
        self.coming.retain_mut(|(number, coming)| match Pin::new(coming).poll(context) {
            Poll::Pending => true,
            // Without a ring its program could not be loaded.
            Poll::Ready(ring) => {
                there.extend(ring.ok().map(|mut ring| {
                    ring.beat();
                    (*number, ring)
                }));
                false
            }
        });
        self.turn = self.turn.wrapping_add(1);
        in_turn(self.turn, &mut self.there, |(_, ring)| ring.poll_next(context))
    }

    pub(super) fn each(&mut self) -> impl Iterator<Item = &mut RequestRing> {
        self.there.iter_mut().map(|(_, ring)| ring)
    }

    /// Closes the ring of a listener. What is in it goes to `each`.
    fn end(&mut self, number: usize, mut each: impl FnMut(Verified)) {
        self.coming.retain(|(of, _)| *of != number);
        for (_, mut ring) in self.there.extract_if(.., |(of, _)| *of == number) {
            ring.take_waiting(&mut each);
        }
    }
}

/// Polls each, beginning with another one each time: a flooded one must not keep the others from
/// their turn.
fn in_turn<T, R>(turn: usize, all: &mut [T], mut poll: impl FnMut(&mut T) -> Poll<R>) -> Poll<R> {
    let first = turn.checked_rem(all.len()).unwrap_or_default();
    let (before, after) = all.split_at_mut(first);
    for one in after.iter_mut().chain(before) {
        if let ready @ Poll::Ready(_) = poll(one) {
            return ready;
        }
    }
    Poll::Pending
}

/// The next request at any socket. Dropping the future loses none.
async fn next_at(sockets: &[(usize, Arc<RequestSocket>)], turn: usize) -> Verified {
    if let [(_, only)] = sockets {
        return only.next().await;
    }
    let mut waiting: Vec<_> = sockets.iter().map(|(_, socket)| Box::pin(socket.next())).collect();
    let mut turn = turn;
    poll_fn(move |context| {
        turn = turn.wrapping_add(1);
        in_turn(turn, &mut waiting, |next| next.as_mut().poll(context))
    })
    .await
}

/// Serves until `stopped` is ready.
pub(super) async fn serve(
    pipeline: &Pipeline,
    sources: &mut Sources,
    questions: &mut Questions,
    look: &Notify,
    stopped: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    tokio::pin!(stopped);
    let watchdog = Watchdog::of_unit();
    let beat =
        Beat::every(watchdog.interval(BEAT)).map_err(|error| DaemonError::Runtime("start the heartbeat", error))?;
    let (mut beats, mut turn) = (0_u32, 0_usize);
    let accept = |incoming: Incoming| {
        fault::standstill(Point::InTheLoop);
        pipeline.accept(incoming);
    };
    loop {
        turn = turn.wrapping_add(1);
        let Sources { sockets, rings, arrivals, changes } = &mut *sources;
        let change = tokio::select! {
            // Only this loop sends the heartbeat: if it hangs, programs and systemd must notice.
            ticked = beat.tick() => {
                ticked.map_err(|error| DaemonError::Runtime("go on with the heartbeat", error))?;
                watchdog.feed();
                rings.each().for_each(RequestRing::beat);
                if let Some(pause) = arrivals.beat() {
                    let pause = pause.as_secs_f32();
                    warn!("the daemon stood still for {pause:.1} s: requests that waited so long are not served");
                }
                beats = beats.wrapping_add(1);
                if beats.is_multiple_of(BEATS_PER_LOOK) {
                    look.notify_one();
                }
                None
            }
            () = &mut stopped => return Ok(()),
            // Its other end lives as long as the daemon.
            Some(change) = changes.recv() => Some(change),
            request = rings.next() => {
                accept(request.map_err(|error| DaemonError::Runtime("read the ring buffer", error))?.into());
                None
            }
            request = next_at(sockets, turn) => {
                accept(request.into());
                None
            }
            // Not in the backlog: a connection's peer has asked what came over it, and no more.
            incoming = arrivals.next() => {
                accept(incoming);
                None
            }
            question = questions.next() => {
                rings.each().for_each(|ring| ring.take_waiting(|request| pipeline.accept(request)));
                sockets.iter().for_each(|(_, socket)| socket.take_waiting(|request| pipeline.accept(request)));
                drop(question);
                None
            }
        };
        if let Some(change) = change {
            sources.change(change, pipeline);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flood at one source must not silence the others.
    #[test]
    fn each_source_has_its_turn_while_another_one_is_always_ready() {
        let mut all = ["flooded", "quiet"];
        let mut got = |turn| in_turn(turn, &mut all, |name| Poll::Ready(*name));
        assert_eq!([0, 1, 2, 3].map(&mut got), ["flooded", "quiet", "flooded", "quiet"].map(Poll::Ready));
        let mut only_one = ["pending", "ready", "pending"];
        for turn in [0, 1, 2, usize::MAX] {
            let found =
                in_turn(turn, &mut only_one, |name| if *name == "ready" { Poll::Ready(()) } else { Poll::Pending });
            assert_eq!(found, Poll::Ready(()), "{turn}");
        }
        assert_eq!(in_turn(7, &mut [(); 0], |()| Poll::Ready(())), Poll::Pending);
    }
}
