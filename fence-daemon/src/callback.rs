//! The callback: connects to the address in a request, and authenticates the peer by the key. A
//! client that has connected itself is authenticated on its own connection.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::time::Duration;

use fence_common::caller::Caller;
use fence_common::exchange::{Challenge, Challenges, Exchange, ExchangeError, Progress};
use fence_common::hash::HashKind;
use fence_common::keys::KeyOwner;
use fence_common::sync::lock;
use fence_common::wire::HASH_LEN;
use fence_config::CONNECTED_AUTH;
use fence_net::link;
use nix::errno::Errno;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::fault::{self, Point};
use crate::intake::line::AtLine;
use crate::intake::request::{Stream, Verified};

/// How long a connection attempt may take: less than the 2 s after which a waiting client asks
/// again, so that its next copy gets a turn. (Stock servers try for 5 s.)
///
/// A longer attempt could outlive its client and reach the guest's next one, which listens at the
/// same port. If that one's own request was lost, it would take this answer for its own.
pub const CONNECT_LIMIT: Duration = Duration::from_millis(1900);
/// How long each half of the exchange may take, as with stock servers.
pub const EXCHANGE_LIMIT: Duration = Duration::from_secs(10);
/// How long writing the reply may take: a peer that does not read must not hold us.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Why a callback failed. The request is forgotten, and its next copy is served.
#[derive(Debug, thiserror::Error)]
pub enum CallbackError {
    /// Nobody could be reached there.
    #[error("cannot connect to {0}: {1} (is TCP port {port} open on the guest?)", port = .0.port())]
    Connect(SocketAddr, io::Error),
    /// Nobody answered there.
    #[error("no connection to {0} within 1.9 s (is TCP port {port} open on the guest?)", port = .0.port())]
    ConnectTimeout(SocketAddr),
    /// The interface that the request came by is gone, and another one might lead to somebody else.
    #[error("cannot connect to {0}: the interface that the request came by is gone or down")]
    Gone(SocketAddr),
    /// The peer accepted the connection and hung up without a word: a client talks only to the
    /// first that calls back.
    #[error("{0} closed the callback without a word: {1}")]
    Unwanted(Caller, io::Error),
    /// The conversation broke off.
    #[error("the connection to {0} broke: {1}")]
    Broken(Caller, io::Error),
    /// The peer is connected and says nothing, or not enough.
    #[error("{0} is connected and silent for 10 s (does it expect another authentication? our `auth` is {auth})", auth = .1.name())]
    Silent(Caller, HashKind),
    /// The peer does not have the key, or attacks.
    #[error("{0}: {1}")]
    Exchange(Caller, #[source] ExchangeError),
    /// Ours: no randomness, no key where one is needed, no files or memory left.
    #[error("this host cannot call anybody back: {0}")]
    Ours(String),
}

/// A request whose client has proven that it has the key (or need not, with `auth = "none"`), or
/// whose domain the hypervisor vouches for, and the way to it.
#[derive(Debug)]
pub struct Authenticated {
    request: Verified,
    way: Way,
    spoke: bool,
}

/// The way to an authenticated client.
#[derive(Debug)]
enum Way {
    Stream(Stream),
    Line(AtLine),
}

impl Authenticated {
    /// A client on a serial line of its domain, without an exam: the line says who asks. Nothing
    /// but a request that was read from a line comes with an [`AtLine`].
    #[must_use]
    pub fn on_line(request: &Verified, line: AtLine) -> Self {
        // A newer request on the line is another client's, whenever it comes.
        Self { request: request.clone(), way: Way::Line(line), spoke: false }
    }

    /// What the peer asks.
    #[must_use]
    pub fn request(&self) -> &Verified {
        &self.request
    }

    /// Whether the peer has sent anything. A client sends its datagrams before it talks, so all its
    /// requests have arrived by then. With `auth = "none"` it need not talk, and may not even have
    /// accepted the connection yet.
    #[must_use]
    pub fn has_spoken(&self) -> bool {
        self.spoke
    }

    /// Whose key the peer has shown that it has.
    #[must_use]
    pub fn owner(&self) -> KeyOwner {
        self.request.owner()
    }

    /// Ends the connection without an answer. Returns the request, for the log.
    #[must_use]
    pub fn dismiss(self) -> Verified {
        self.request
    }

    /// Sends the reply and ends the connection. Returns the request, for the log, and whether the
    /// reply was delivered: a peer may be gone, or may not read.
    pub async fn reply(self, bytes: &[u8]) -> (Verified, io::Result<()>) {
        let write = async {
            match self.way {
                Way::Stream(mut stream) => {
                    stream.write_all(bytes).await?;
                    stream.shutdown().await
                }
                Way::Line(line) => line.reply(bytes).await,
            }
        };
        let written = timeout(REPLY_LIMIT, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        (self.request, written)
    }
}

/// What callbacks are made with: the challenges that are open, at whichever listener. None of them
/// is ever answered.
#[derive(Debug, Default)]
pub struct Callback {
    open: Mutex<Challenges>,
}

impl Callback {
    /// Connects to the request's address, and lets both sides prove that they have the request's
    /// key, by the digest of its listener. A request without a key fails, unless that is
    /// [`HashKind::None`].
    ///
    /// Takes at most 22 s. Cancel it by dropping the future.
    ///
    /// # Errors
    /// See [`CallbackError`].
    pub async fn call(&self, request: &Verified) -> Result<Authenticated, CallbackError> {
        let interface = request.endpoint().interface;
        let Caller::Ip(caller) = request.caller() else {
            return Err(CallbackError::Ours("its client has no IP address".to_owned()));
        };
        let stream = match timeout(CONNECT_LIMIT, connect(caller, interface)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(_)) if interface != 0 && !link::one(interface).is_ok_and(|link| link.up) => {
                return Err(CallbackError::Gone(caller));
            }
            Ok(Err(error)) if is_ours(&error) => return Err(CallbackError::Ours(error.to_string())),
            Ok(Err(error)) => return Err(CallbackError::Connect(caller, error)),
            Err(_) => return Err(CallbackError::ConnectTimeout(caller)),
        };
        fault::point(Point::AfterConnect);
        // Each side waits for small messages. Without the option they are only slower.
        let _ = stream.set_nodelay(true);
        self.examine(request, Box::new(stream), request.origin().auth).await
    }

    /// Lets both sides of a client's own connection prove that they have the key.
    ///
    /// Takes at most 20 s. Cancel it by dropping the future.
    ///
    /// # Errors
    /// See [`CallbackError`].
    pub async fn answer(&self, request: &Verified, stream: Stream) -> Result<Authenticated, CallbackError> {
        self.examine(request, stream, CONNECTED_AUTH).await
    }

    async fn examine(
        &self,
        request: &Verified,
        mut stream: Stream,
        auth: HashKind,
    ) -> Result<Authenticated, CallbackError> {
        let spoke = auth != HashKind::None;
        if spoke {
            self.exchange(request, &mut stream, auth).await?;
        }
        Ok(Authenticated { request: request.clone(), way: Way::Stream(stream), spoke })
    }

    async fn exchange(&self, request: &Verified, stream: &mut Stream, auth: HashKind) -> Result<(), CallbackError> {
        let caller = request.caller();
        let key = request.key().ok_or_else(|| CallbackError::Ours("no key is loaded".to_owned()))?;
        let question = OpenChallenge::new(&self.open)?;
        let mut exchange = Exchange::new(auth, question.challenge);
        // Only a callback can be unwanted: its client may have accepted another one.
        let mut heard = request.is_connected();
        while !exchange.is_authenticated() {
            let mut buffer = [0; HASH_LEN];
            let half = &mut buffer[..exchange.missing()];
            match timeout(EXCHANGE_LIMIT, stream.read_exact(half)).await {
                Ok(Ok(_)) => {}
                // It speaks first.
                Ok(Err(error)) if !heard => return Err(CallbackError::Unwanted(caller, error)),
                Ok(Err(error)) => return Err(CallbackError::Broken(caller, error)),
                Err(_) => return Err(CallbackError::Silent(caller, auth)),
            }
            heard = true;
            let progress = {
                let open = lock(&self.open);
                exchange.receive(key, &open, half)
            };
            match progress.map_err(|error| CallbackError::Exchange(caller, error))? {
                Progress::Receive | Progress::Authenticated => {}
                Progress::Send(bytes) => match timeout(EXCHANGE_LIMIT, stream.write_all(&bytes)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return Err(CallbackError::Broken(caller, error)),
                    Err(_) => return Err(CallbackError::Silent(caller, auth)),
                },
            }
        }
        Ok(())
    }
}

/// Connects through this interface, if it is not 0. (From Linux 5.7 on any process may bind
/// an unbound socket to an interface.)
async fn connect(address: SocketAddr, interface: u32) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let (options, interface) = (SockRef::from(&socket), NonZeroU32::new(interface));
    match address {
        SocketAddr::V4(_) => options.bind_device_by_index_v4(interface)?,
        SocketAddr::V6(_) => options.bind_device_by_index_v6(interface)?,
    }
    socket.connect(address).await
}

/// Whether a connection failed for lack of something on this host, so that nobody searches at the
/// guest.
fn is_ours(error: &io::Error) -> bool {
    let lacking = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM, Errno::EADDRNOTAVAIL, Errno::EPERM];
    error.raw_os_error().is_some_and(|code| lacking.contains(&Errno::from_raw(code)))
}

/// Our challenge, listed as open while the conversation lasts, however that ends.
struct OpenChallenge<'a> {
    open: &'a Mutex<Challenges>,
    challenge: Challenge,
}

impl<'a> OpenChallenge<'a> {
    fn new(open: &'a Mutex<Challenges>) -> Result<Self, CallbackError> {
        let mut challenge = [0; HASH_LEN];
        getrandom::fill(&mut challenge).map_err(|error| CallbackError::Ours(format!("no random bytes: {error}")))?;
        if lock(open).open(challenge) {
            Ok(Self { open, challenge })
        } else {
            Err(CallbackError::Ours("the random source repeats itself".to_owned()))
        }
    }
}

impl Drop for OpenChallenge<'_> {
    fn drop(&mut self) {
        lock(self.open).close(&self.challenge);
    }
}
