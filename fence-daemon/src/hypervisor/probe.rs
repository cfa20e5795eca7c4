//! One look at each URI from outside of the daemon: whether it connects, and which domains it has.
//! Nothing is followed, held or changed.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::Listed;
use super::libvirt::domain::list_once;
use super::libvirt::{CallError, Row, State};

type ListAnswer = Result<Vec<Listed>, CallError>;

/// Asks all URIs at the same time for their domains. Those that do not answer within `bound` are
/// [`CallError::Overdue`]. Their calls stay where they are: the caller must end the process without
/// waiting ([`crate::process::leave`]).
#[must_use]
pub fn probe(uris: &[String], bound: Duration) -> Vec<(String, ListAnswer)> {
    let until = Instant::now() + bound;
    let asked: Vec<_> = uris.iter().map(|uri| (uri, ask(uri))).collect();
    let answered = |(uri, answer): (&String, Result<mpsc::Receiver<_>, CallError>)| {
        let left = until.saturating_duration_since(Instant::now());
        let answer = answer.and_then(|answer| answer.recv_timeout(left).unwrap_or(Err(CallError::Overdue)));
        (uri.clone(), answer)
    };
    asked.into_iter().map(answered).collect()
}

fn ask(uri: &str) -> Result<mpsc::Receiver<ListAnswer>, CallError> {
    let (sender, answer) = mpsc::channel();
    let uri: Arc<str> = uri.into();
    // Fails only if the caller has given up.
    let look = move || drop(sender.send(list(&uri)));
    let spawned = thread::Builder::new().name("virt-probe".to_owned()).spawn(look);
    spawned.map(|_| answer).map_err(|_| CallError::Busy("no thread could be started to connect on"))
}

fn list(uri: &Arc<str>) -> ListAnswer {
    let listed = |Row { name, uuid, state: State(state), .. }: Row| Listed {
        name,
        uuid,
        state,
        uri: Arc::clone(uri),
        elsewhere: false,
    };
    Ok(list_once(uri)?.into_iter().map(listed).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_lists_domains_or_reports_the_error() {
        let uris = ["test:///default", "qemu+unix:///system?socket=/nowhere"].map(str::to_owned);
        let probed = probe(&uris, Duration::from_secs(60));
        let [(_, Ok(there)), (_, Err(error))] = probed.as_slice() else { panic!("{probed:?}") };
        assert_eq!(there.iter().map(|domain| domain.name.as_str()).collect::<Vec<_>>(), ["test"]);
        assert!(error.to_string().contains("/nowhere"), "{error}");
        assert_eq!(probe(&uris[..1], Duration::ZERO).len(), 1);
    }
}
