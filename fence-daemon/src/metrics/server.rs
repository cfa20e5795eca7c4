//! The port or socket that Prometheus reads the metrics at.
//!
//! No fence waits for a scraper, however slow or hostile:
//! - Few connections are served at a time (`CLIENTS_MAX`), and few begin in a second (`PACE`).
//!   Further ones wait in the kernel, and not in the daemon.
//! - A connection is one request, and has `WITHIN` for all of it. Its head has at most
//!   `HEAD_MAX` bytes.
//! - The page is made at most once in `FRESH`, on a thread that serves no request.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fence_config::Metrics as Place;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::page;
use crate::control::inspector::Inspector;
use crate::state::socket::SocketFile;

/// How many scrapers are served at a time. One Prometheus, or two, and an administrator.
const CLIENTS_MAX: usize = 4;
/// The least time between the beginnings of two connections.
const PACE: Duration = Duration::from_millis(20);
/// How long a connection may last. Prometheus gives up after 10 s by default.
const WITHIN: Duration = Duration::from_secs(5);
/// The longest head of a request, in bytes: the least that hyper can be limited to.
const HEAD_MAX: usize = 8192;
/// How long a page is shown again.
const FRESH: Duration = Duration::from_secs(1);
/// How many connections wait in the kernel.
const BACKLOG: u32 = 16;
/// How long to wait before the next attempt to open the port.
const AGAIN: Duration = Duration::from_secs(10);
/// How long to wait after the listener itself failed.
const AFTER_ERROR: Duration = Duration::from_millis(100);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

/// The metrics. Dropping them closes the port.
#[derive(Debug)]
pub struct Metrics(JoinHandle<()>);

impl Metrics {
    /// Opens the port or socket, and serves. While it cannot be opened, the log says why, and the
    /// daemon tries again. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(place: Place, inspector: Arc<Inspector>) -> Self {
        let pages = Arc::new(Pages { inspector, kept: Arc::new(Mutex::new(None)) });
        Self(tokio::spawn(async move {
            let mut told = None;
            loop {
                match Listener::open(&place) {
                    Ok(listener) => {
                        tracing::info!(%place, "metrics are served");
                        return serve(listener, pages).await;
                    }
                    Err(error) => {
                        let why = error.to_string();
                        if told.as_ref() != Some(&why) {
                            tracing::warn!("no metrics at {place}: {why} (the daemon tries on)");
                        }
                        told = Some(why);
                    }
                }
                sleep(AGAIN).await;
            }
        }))
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        self.0.abort();
    }
}

trait Scraper: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Scraper for T {}

enum Listener {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        /// Removed with this value.
        _file: SocketFile,
    },
}

impl Listener {
    fn open(place: &Place) -> io::Result<Self> {
        Ok(match place {
            Place::Tcp(address) => {
                let socket = match address {
                    SocketAddr::V4(_) => TcpSocket::new_v4()?,
                    SocketAddr::V6(_) => TcpSocket::new_v6()?,
                };
                // The connections of the daemon before must not keep the port.
                socket.set_reuseaddr(true)?;
                socket.bind(*address)?;
                Self::Tcp(socket.listen(BACKLOG)?)
            }
            Place::Unix(path) => {
                let (file, listener) = SocketFile::bind_for_all(path)?;
                Self::Unix { listener: UnixListener::from_std(listener)?, _file: file }
            }
        })
    }

    async fn accept(&self) -> io::Result<Box<dyn Scraper>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix { listener, .. } => Box::new(listener.accept().await?.0),
        })
    }
}

async fn serve(listener: Listener, pages: Arc<Pages>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    // Never closed, so there is always a place in the end.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!("the metrics' port: {error}");
                sleep(AFTER_ERROR).await;
                continue;
            }
        };
        let pages = Arc::clone(&pages);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, Arc::clone(&pages)));
            let mut http = http1::Builder::new();
            http.keep_alive(false).max_buf_size(HEAD_MAX).header_read_timeout(None);
            // A scraper that has gone, or is too slow, tries again.
            let _ = timeout(WITHIN, http.serve_connection(TokioIo::new(stream), service)).await;
            drop(place);
        });
        sleep(PACE).await;
    }
}

/// The latest page.
struct Pages {
    inspector: Arc<Inspector>,
    kept: Arc<Mutex<Option<Page>>>,
}

/// A page in both formats.
#[derive(Clone)]
struct Page {
    made: Instant,
    open_metrics: Bytes,
    classic: Bytes,
}

impl Pages {
    async fn latest(&self) -> Option<Page> {
        let mut kept = Arc::clone(&self.kept).lock_owned().await;
        if let Some(page) = kept.as_ref().filter(|page| page.made.elapsed() < FRESH) {
            return Some(page.clone());
        }
        let inspector = Arc::clone(&self.inspector);
        // On a blocking thread, as for `status`: it asks the kernel for its counters. The lock goes
        // along, so that a scraper that gives up does not make the next one begin a second page.
        let made = tokio::task::spawn_blocking(move || {
            let open_metrics = page::open_metrics(Arc::new(inspector.report())).ok()?;
            let classic = page::classic(&open_metrics).into();
            let page = Page { made: Instant::now(), open_metrics: open_metrics.into(), classic };
            *kept = Some(page.clone());
            Some(page)
        });
        made.await.ok()?
    }
}

async fn answer(request: Request<Incoming>, pages: Arc<Pages>) -> Result<Response<Full<Bytes>>, Infallible> {
    let accepts = |kind: &str| {
        let all = request.headers().get_all(ACCEPT).iter();
        all.filter_map(|value| value.to_str().ok()).any(|value| value.contains(kind))
    };
    let is_open = accepts("application/openmetrics-text");
    let response = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => match pages.latest().await {
            Some(page) if is_open => said(StatusCode::OK, OPEN_METRICS, page.open_metrics),
            Some(page) => said(StatusCode::OK, CLASSIC, page.classic),
            None => said(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, "the page could not be made\n"),
        },
        (&Method::GET | &Method::HEAD, _) => {
            said(StatusCode::NOT_FOUND, PLAIN, "fence-daemon: the metrics are at /metrics\n")
        }
        _ => said(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "only GET and HEAD\n"),
    };
    Ok(response)
}

fn said(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
    }
    response
}
