//! The end of a request: the reply to the peer, unless another client may be there, and the log
//! line.

use std::io;

use fence_common::ending::Ending;
use fence_common::ledger::{Claim, Denial};
use tracing::{info, warn};

use super::answer::{Answer, Tone};
use super::deferral::Deferral;
use super::{Shared, domain};
use crate::callback::Authenticated;
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::observe::requests::Ended;
use crate::observe::steps::Steps;

/// What the ledger has granted for a request that is answered.
#[derive(Debug)]
pub(super) enum Granted {
    Claim(Claim),
    Denial(Denial),
    /// There is no room for another claim.
    Nothing,
}

impl Shared {
    /// Replies, unless the peer may be one that has asked something else, and logs.
    pub(super) async fn finish(
        &self,
        peer: Authenticated,
        held: Granted,
        answer: Answer,
        mut steps: Steps,
        deferral: Deferral,
    ) -> Ended {
        self.backlog.read().await;
        let superseded = match &held {
            Granted::Claim(claim) => self.ledger().is_claim_superseded(claim),
            Granted::Denial(denial) => self.ledger().is_denial_superseded(denial),
            Granted::Nothing => false,
        };
        fault::point(Point::BeforeReply);
        // A domain that fenced itself has nobody who waits; a machine that was reset would read it.
        let by_its_victim = peer.request().is_of_its_own_victim() && answer.result == Ending::Success;
        let (request, sent) = if superseded || by_its_victim {
            (peer.dismiss(), None)
        } else {
            let (request, sent) = peer.reply(&answer.bytes).await;
            (request, Some(sent))
        };
        fault::point(Point::AfterReply);
        let now = Moment::now();
        match held {
            Granted::Claim(claim) => self.ledger().answered(now.nanos(), claim),
            Granted::Denial(denial) => self.ledger().close_denial(denial),
            Granted::Nothing => {}
        }
        steps.replied = sent.as_ref().is_some_and(Result::is_ok).then_some(now);
        let (reply, note) = if by_its_victim { told_nobody() } else { told(answer.result, sent.as_ref()) };
        let waited = deferral.waited();
        macro_rules! tell {
            ($level:ident, $held_back:expr) => {
                $level!(
                    op = %request.op().name(),
                    domain = %domain(&request),
                    source = %request.who(),
                    seqno = request.seqno(),
                    via = %request.way(),
                    reply = %reply.name().replace(' ', "-"),
                    verified = %steps.since_arrival(Some(steps.verified)),
                    called_back = %steps.since_arrival(steps.called_back),
                    dead = %steps.since_arrival(steps.dead),
                    replied = %steps.since_arrival(steps.replied),
                    held_back = $held_back,
                    "{}{note}{waited}", answer.detail,
                )
            };
        }
        match answer.tone {
            Tone::Done => tell!(info, None::<u64>),
            Tone::Asked => self.complain(request.caller().address(), |held_back| tell!(info, some(held_back))),
            Tone::Refused => self.complain(request.caller().address(), |held_back| tell!(warn, some(held_back))),
        }
        let detail = format!("{}{note}{waited}", answer.detail);
        Ended { result: reply, detail, steps: Some(steps) }
    }
}

/// A number for the log, if there is one.
fn some(held_back: u64) -> Option<u64> {
    (held_back > 0).then_some(held_back)
}

/// What the log says of a domain that fenced itself.
fn told_nobody() -> (Ending, String) {
    (Ending::Unsent, "; not answered: the domain has fenced itself".to_owned())
}

/// The reply for the log; without one, the reason. The log must not show a success that no client
/// received.
pub(super) fn told(result: Ending, sent: Option<&io::Result<()>>) -> (Ending, String) {
    match sent {
        Some(Ok(())) => (result, String::new()),
        Some(Err(error)) => (Ending::Undelivered, format!("; the answer could not be delivered: {error}")),
        None => (
            Ending::Unsent,
            "; not answered: the peer may have asked something newer from the same address and port".to_owned(),
        ),
    }
}
