//! The callback conversation up to authentication, as a state machine over bytes.
//!
//! After the host has connected (source: behaviour of Debian 12's `fence_xvm` 4.12.1):
//!
//! 1. client to host: 64 random bytes; host to client: `H(key || challenge)`, zero-padded to 64;
//! 2. host to client: 64 random bytes; client to host: `H(key || challenge)`, zero-padded to 64.
//!
//! `auth = none` skips both halves. A response does not say for which side it was made, and the
//! client asks first. So an attacker that makes this host call back twice could send the challenge
//! of one conversation in the other, and have the host answer its own challenge. [`Challenges`]
//! prevents that: a received challenge that is an open one of our own ends the conversation.
//!
//! It cannot prevent that two hosts with the same key are played against each other. That needs
//! fields that stock peers do not send.

use alloc::collections::BTreeSet;

use subtle::ConstantTimeEq;

use crate::hash::HashKind;
use crate::key::Key;
use crate::wire::HASH_LEN;

/// A challenge: 64 random bytes.
pub type Challenge = [u8; HASH_LEN];

/// The challenges that this host has sent and that are not answered yet.
///
/// After its conversation an answer to a challenge opens nothing, so only open ones matter. They
/// never expire, so no flood of conversations can evict one. Their number is bounded by the caller.
#[derive(Debug, Default)]
#[cfg_attr(feature = "model", derive(Clone, PartialEq, Eq, Hash))]
pub struct Challenges(BTreeSet<Challenge>);

impl Challenges {
    /// Adds a challenge that is about to be sent. `false` if the same one is open: then the random
    /// source is broken, and the challenge must not be sent.
    #[must_use]
    pub fn open(&mut self, challenge: Challenge) -> bool {
        self.0.insert(challenge)
    }

    /// Removes a challenge whose conversation is over.
    pub fn close(&mut self, challenge: &Challenge) {
        self.0.remove(challenge);
    }

    /// Whether this is an open challenge of ours.
    #[must_use]
    pub fn is_ours(&self, challenge: &Challenge) -> bool {
        self.0.contains(challenge)
    }

    /// How many are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The next step after a receive.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Receive more: [`Exchange::missing`] bytes.
    Receive,
    /// Send these 128 bytes (our response, then our challenge). Then receive more.
    Send([u8; 2 * HASH_LEN]),
    /// The peer has the key.
    Authenticated,
}

/// Why a conversation ends without authentication. Each reason is the peer's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The peer sent one of our own challenges, so that we answer it.
    #[error("the peer sent our own challenge back to us (a reflection attack, or a mirrored network)")]
    Reflected,
    /// The response does not match key and challenge.
    #[error("the peer's response is wrong: another key, or another -C on its side than our `auth`")]
    WrongResponse,
    /// More bytes than the protocol allows.
    #[error("the peer sent more than it was asked for")]
    Excess,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "model", derive(Hash))]
enum Phase {
    AwaitChallenge,
    AwaitResponse,
    Authenticated,
    Failed,
}

/// One conversation. The caller moves the bytes and keeps the time (stock peers: 10 s per half).
#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone, PartialEq, Eq, Hash))]
pub struct Exchange {
    auth: HashKind,
    ours: Challenge,
    state: Phase,
    received: [u8; HASH_LEN],
    len: usize,
}

impl Exchange {
    /// A conversation with our challenge `ours`: fresh random bytes that the caller adds to
    /// [`Challenges`].
    #[must_use]
    pub const fn new(auth: HashKind, ours: Challenge) -> Self {
        let state = match auth {
            HashKind::None => Phase::Authenticated,
            HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512 => Phase::AwaitChallenge,
        };
        Self { auth, ours, state, received: [0; HASH_LEN], len: 0 }
    }

    /// Whether the peer has proved that it has the key, or need not.
    #[must_use]
    pub fn is_authenticated(&self) -> bool {
        self.state == Phase::Authenticated
    }

    /// How many bytes the next step needs. 0 if there is none.
    #[must_use]
    pub fn missing(&self) -> usize {
        match self.state {
            Phase::AwaitChallenge | Phase::AwaitResponse => HASH_LEN - self.len,
            Phase::Authenticated | Phase::Failed => 0,
        }
    }

    /// Takes bytes from the peer, at most [`Exchange::missing`] at a time.
    ///
    /// # Errors
    /// If the peer is wrong. The conversation is over then and must be closed without another byte.
    pub fn receive(&mut self, key: &Key, open: &Challenges, bytes: &[u8]) -> Result<Progress, ExchangeError> {
        if bytes.len() > self.missing() {
            return self.fail(ExchangeError::Excess);
        }
        self.received[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        if self.len < HASH_LEN {
            return Ok(Progress::Receive);
        }
        self.len = 0;
        match self.state {
            Phase::AwaitChallenge if open.is_ours(&self.received) => self.fail(ExchangeError::Reflected),
            Phase::AwaitChallenge => {
                let mut out = [0; 2 * HASH_LEN];
                out[..HASH_LEN].copy_from_slice(&key.digest(self.auth, &[&self.received]));
                out[HASH_LEN..].copy_from_slice(&self.ours);
                self.state = Phase::AwaitResponse;
                Ok(Progress::Send(out))
            }
            Phase::AwaitResponse => {
                let expected = key.digest(self.auth, &[&self.ours]);
                if expected.ct_eq(&self.received).into() {
                    self.state = Phase::Authenticated;
                    Ok(Progress::Authenticated)
                } else {
                    self.fail(ExchangeError::WrongResponse)
                }
            }
            Phase::Authenticated | Phase::Failed => self.fail(ExchangeError::Excess),
        }
    }

    fn fail(&mut self, error: ExchangeError) -> Result<Progress, ExchangeError> {
        self.state = Phase::Failed;
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> Key {
        Key::new(b"a key").unwrap()
    }

    /// Plays an honest client, handing over its bytes in pieces of `piece`.
    fn converse(auth: HashKind, client_key: &Key, piece: usize) -> Result<Progress, ExchangeError> {
        let mut open = Challenges::default();
        let (ours, theirs) = ([1; HASH_LEN], [2; HASH_LEN]);
        assert!(open.open(ours));
        let mut exchange = Exchange::new(auth, ours);
        let mut last = Progress::Receive;
        for chunk in theirs.chunks(piece) {
            assert_eq!(last, Progress::Receive);
            last = exchange.receive(&key(), &open, chunk)?;
        }
        let Progress::Send(out) = last else { panic!("no answer to the challenge: {last:?}") };
        assert_eq!(out[..HASH_LEN], key().digest(auth, &[&theirs]));
        assert!(!exchange.is_authenticated());
        let response = client_key.digest(auth, &[&out[HASH_LEN..]]);
        let mut last = Progress::Receive;
        for chunk in response.chunks(piece) {
            assert_eq!(last, Progress::Receive);
            last = exchange.receive(&key(), &open, chunk)?;
        }
        assert_eq!(exchange.is_authenticated(), last == Progress::Authenticated);
        assert_eq!(exchange.missing(), 0);
        Ok(last)
    }

    #[test]
    fn an_honest_client_passes_with_every_hash() {
        for auth in [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512] {
            assert_eq!(converse(auth, &key(), HASH_LEN), Ok(Progress::Authenticated));
        }
    }

    #[test]
    fn another_key_does_not_pass() {
        let other = Key::new(b"another key").unwrap();
        assert_eq!(converse(HashKind::Sha256, &other, HASH_LEN), Err(ExchangeError::WrongResponse));
    }

    #[test]
    fn without_auth_there_is_nothing_to_do() {
        let exchange = Exchange::new(HashKind::None, [0; HASH_LEN]);
        assert!(exchange.is_authenticated());
        assert_eq!(exchange.missing(), 0);
    }

    #[test]
    fn our_own_challenge_is_not_answered_while_it_is_open() {
        let mut open = Challenges::default();
        let (first, second) = ([1; HASH_LEN], [2; HASH_LEN]);
        assert!(open.open(first) && open.open(second));
        assert!(!open.open(first), "the same challenge twice is a broken random source");
        let mut exchange = Exchange::new(HashKind::Sha256, second);
        assert_eq!(exchange.receive(&key(), &open, &first), Err(ExchangeError::Reflected));
        assert_eq!(exchange.receive(&key(), &open, &[3; HASH_LEN]), Err(ExchangeError::Excess), "it is over");
        open.close(&first);
        let mut exchange = Exchange::new(HashKind::Sha256, second);
        assert!(matches!(exchange.receive(&key(), &open, &first), Ok(Progress::Send(_))));
        assert_eq!((open.len(), open.is_empty()), (1, false));
    }

    #[test]
    fn more_than_asked_for_is_refused() {
        let mut exchange = Exchange::new(HashKind::Sha1, [0; HASH_LEN]);
        assert_eq!(exchange.receive(&key(), &Challenges::default(), &[0; HASH_LEN + 1]), Err(ExchangeError::Excess));
    }

    proptest! {
        #[test]
        fn the_pieces_do_not_matter(piece in 1..=HASH_LEN) {
            prop_assert_eq!(converse(HashKind::Sha512, &key(), piece), Ok(Progress::Authenticated));
        }

        #[test]
        fn random_bytes_never_pass(challenge: [u8; 32], response: [u8; 32]) {
            let mut exchange = Exchange::new(HashKind::Sha256, [9; HASH_LEN]);
            let open = Challenges::default();
            let _ = exchange.receive(&key(), &open, &[challenge, challenge].concat());
            let outcome = exchange.receive(&key(), &open, &[response, [0; 32]].concat());
            prop_assert_eq!(outcome, Err(ExchangeError::WrongResponse));
            prop_assert!(!exchange.is_authenticated());
        }
    }
}
