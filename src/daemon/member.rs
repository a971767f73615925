//! A member at work: everything that runs while this node is in a mesh, and the order in which it starts and ends.
//!
//! Start: trust -> SVIDs -> rules (empty) -> mesh port -> gossip -> addresses -> capture. End: tell the others -> rules away -> let
//! connections end -> cut the rest. Tasks live in one set and end with it.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use hyper::StatusCode;
use meshd_agent::catalog::Catalog;
use meshd_agent::gossip::{Gossip, GossipConfig};
use meshd_agent::record::{Listener, Presence};
use meshd_ca::identity::{MeshId, NodeId};
use meshd_ca::roster::{Roster, Standing};
use meshd_ca::time::UnixTime;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::addresses::{self, Book, News};
use super::authorities::Authorities;
use super::directory::Snapshots;
use super::keeper::{Keeper, Sequence};
use super::kernel::{HostKernel, Marked, Owners};
use super::listeners::skip_ports;
use super::rules::{self, Rules};
use super::successor::{Handover, Successor};
use super::timekeeper::Timekeeper;
use super::{Daemon, End, Halt, Phase, Request, Stop, acquire, before, enrolment, knock, memory, merge, successor};
use crate::admin::local::No;
use crate::admin::view;
use crate::api::Done;
use crate::config::Mode;
use crate::control::crowd::Crowd;
use crate::control::front::{self, Arrived, Configs};
use crate::control::gossip::{self, Mailbox};
use crate::control::issuance;
use crate::control::join;
use crate::control::link::Links;
use crate::control::serve::{self, Api, Callers};
use crate::control::waiting::Waiting;
use crate::identity::provider;
use crate::identity::svids::{Patience, Svids};
use crate::identity::tls::{DataTls, NodeTls};
use crate::identity::verifier::{SvidVerifier, Trust};
use crate::intercept::sockdiag::SockDiag;
use crate::intercept::socket::Mark;
use crate::membership::Membership;
use crate::proxy::{self, Proxy};
use crate::task::{self, Tasks};

/// For how long a host waits for another authority's word when the one that let it in was put out.
const ORPHANED: Duration = Duration::from_secs(600);
/// How long after this host got another node key, and after each attempt, the next process is started by itself to go on with it.
const TAKES_OVER: Duration = Duration::from_secs(30);
/// How often rules, links and edges are looked after.
const TICK: Duration = Duration::from_secs(2);
/// How long the news of this node's stop may take to leave.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a host that moves into another mesh still answers in the one before, for those who were on the way when they heard of it.
const LINGER: Duration = Duration::from_millis(300);
/// How long an edge without connections is remembered.
const EDGE_AGE: Duration = Duration::from_secs(3600);
/// How long a change of SVIDs settles before it is saved.
const SETTLE: Duration = Duration::from_secs(1);
/// How long after a failed write the next is tried.
const RETRY: Duration = Duration::from_secs(15);
/// Saved: SVIDs and their keys, so that a restart without any authority in reach still has them.
const SVIDS: &str = "svids";

/// A member at work, for whoever wants to look.
pub(crate) struct Member {
    pub(crate) membership: Arc<Membership>,
    pub(crate) book: Book,
    pub(crate) rules: Arc<Rules>,
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) svids: Arc<Svids>,
    pub(crate) links: Arc<Links>,
    pub(crate) authorities: Arc<Authorities>,
    /// What the mesh port counts.
    pub(crate) door: Arc<front::Counters>,
    clock: crate::clock::Clock,
    port: u16,
    catalog: watch::Receiver<Arc<Catalog>>,
    addresses: watch::Receiver<super::lan::Addresses>,
    heard: Arc<Heard>,
    /// Why this host has not followed its mesh into another one yet.
    pub(crate) moving: merge::Trouble,
    /// Who asks to be let in without a token.
    pub(crate) waiting: Arc<Waiting>,
}

impl Member {
    pub(crate) fn me(&self) -> NodeId {
        self.membership.me()
    }
    pub(crate) fn mesh(&self) -> MeshId {
        self.membership.roster().mesh()
    }
    /// Whether this is a mesh of one, which may still be given up for another.
    pub(crate) fn is_alone(&self) -> bool {
        self.membership.roster().active().count() == 1
    }
    pub(crate) fn now(&self) -> UnixTime {
        self.clock.now()
    }
    pub(crate) fn catalog(&self) -> Arc<Catalog> {
        self.catalog.borrow().clone()
    }
    /// Every catalog from now on.
    pub(crate) fn watch_catalog(&self) -> watch::Receiver<Arc<Catalog>> {
        self.catalog.clone()
    }
    /// Whether a node is up, as far as gossip knows.
    pub(crate) fn hears(&self, node: NodeId) -> bool {
        self.heard.hears(node)
    }
    /// How long ago a node was heard: no time for one that is up.
    pub(crate) fn last_heard(&self, node: NodeId) -> Option<Duration> {
        let heard = self.heard.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(&node).map(|(up, at)| if *up { Duration::ZERO } else { at.elapsed() })
    }
    pub(crate) fn own_addresses(&self) -> Arc<BTreeSet<IpAddr>> {
        self.addresses.borrow().own.clone()
    }
    pub(crate) fn skip_ports(&self) -> BTreeSet<u16> {
        self.rules.skip_ports()
    }
    fn look_after(&self) {
        self.rules.tend();
        self.links.sweep();
        self.proxy.pool.sweep(Instant::now());
        self.proxy.edges.expire(self.now(), EDGE_AGE);
    }
    /// Where a token should say that this host is.
    pub(crate) fn hints(&self) -> Vec<SocketAddr> {
        view::reachable_at(&self.addresses.borrow().published, self.port)
    }
}

/// Which nodes gossip hears, and since when not.
#[derive(Default)]
pub(crate) struct Heard(Mutex<HashMap<NodeId, (bool, Instant)>>);

impl Heard {
    /// Every node that was ever heard, and whether it is now.
    pub(crate) fn all(&self) -> Vec<(NodeId, bool)> {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.iter().map(|(node, (up, _))| (*node, *up)).collect()
    }

    /// The same, and for how long it has been so.
    pub(crate) fn since(&self) -> Vec<(NodeId, bool, Duration)> {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.iter().map(|(node, (up, at))| (*node, *up, at.elapsed())).collect()
    }

    fn hears(&self, node: NodeId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&node).is_some_and(|(up, _)| *up)
    }

    fn note(&self, node: NodeId, up: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(node, (up, Instant::now()));
    }
}

/// Runs a member until something ends it. `first` is where another member was found.
pub(super) async fn run(
    daemon: &Arc<Daemon>,
    membership: Arc<Membership>,
    first: Vec<SocketAddr>,
    inbox: &mut mpsc::Receiver<Request>,
    stop: &mut Stop,
) -> anyhow::Result<End> {
    // What needs a restart to change; mode and skipped ports are asked for where they matter.
    let config = &*daemon.config();
    let clock = daemon.clock().clone();
    let mut tasks = Tasks::new();
    let mut roster = membership.watch();

    // Whom we believe, and by which clock.
    let crypto = provider::provider(provider::has_aes());
    let node_tls = NodeTls::new(&crypto, &daemon.key).context("cannot make the node's own certificate")?;
    let trust = Arc::new(ArcSwap::from_pointee(Trust { bundle: membership.bundle(), roster: membership.roster() }));
    let now = {
        let clock = clock.clone();
        Arc::new(move || clock.now())
    };
    let dates = {
        let clock = clock.clone();
        // Certificates of another time: ours may be the wrong one.
        Arc::new(move |signed: Option<UnixTime>| {
            if !signed.is_some_and(|signed| clock.hear(signed)) {
                clock.doubt();
            }
        })
    };
    let verifier = Arc::new(SvidVerifier::new(trust.clone(), now, crypto).doubting(dates));

    // The ways to the others.
    let (catalog_writer, catalog) = watch::channel(Arc::new(Catalog::default()));
    let (opened, mut sessions) = mpsc::channel(64);
    let (book, book_side) = addresses::book();
    let whereabouts = {
        let (book, catalog) = (book.clone(), catalog.clone());
        move |node| whereabouts(&book, &catalog, node)
    };
    let links = Arc::new(Links::new(
        membership.clone(),
        node_tls.control_client.clone(),
        Arc::new(Marked),
        Box::new(whereabouts),
        opened,
        config.port,
    ));
    let (mailbox, gossip_inbox) = Mailbox::new();

    // Our own names.
    let heard = Arc::new(Heard::default());
    let issuance = issuance::Authorities {
        membership: membership.clone(),
        links: links.clone(),
        clock: clock.clone(),
        lifetime: config.svid_lifetime,
        hears: {
            let heard = heard.clone();
            Box::new(move |node| heard.hears(node))
        },
        failures: issuance::Failures::default(),
    };
    let svids = Svids::new(membership.me(), verifier.clone(), Patience::default());
    // They may be lost: new ones are asked for.
    match daemon.store.load(SVIDS) {
        Ok(Some(saved)) => match svids.import(&saved.bytes) {
            Ok(count) => tracing::debug!(count, "took over saved SVIDs"),
            Err(error) => tracing::warn!(%error, "saved SVIDs are not used"),
        },
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "saved SVIDs are not used"),
    }
    {
        let svids = svids.clone();
        // Made before the first is issued, which an authority does at once: none goes unsaved.
        let changes = svids.changes();
        tasks.spawn(save_svids(daemon.clone(), svids.clone(), changes));
        tasks.spawn(async move { match svids.run(&issuance).await {} });
    }
    let looked: Arc<ArcSwap<Vec<Listener>>> = Arc::default();
    let owners = Arc::new(Owners::new(membership.name()));

    // The kernel and the data plane.
    let bound = addresses::remembered(&daemon.store).into_iter().filter(|(_, node)| membership.roster().is_host_active(*node));
    let bound = bound.map(|(ip, _)| ip).collect();
    let rules = Arc::new(Rules::install(config, skip_ports(config), &bound, daemon.manager.clone())?);
    let snapshots = Arc::new(Snapshots {
        book: book.clone(),
        catalog: catalog.clone(),
        addresses: daemon.lan.addresses(),
        listeners: looked.clone(),
        carried: (std::mem::take(&mut *daemon.before.bound()), Instant::now() + rules::carry(config)),
    });
    let kernel = Arc::new(HostKernel { owners: owners.clone(), diag: SockDiag::open()?, rules: rules.clone() });
    let memory = crate::intercept::process::memory();
    proxy::tunnel::bound_by(memory);
    let proxy = Proxy::new(
        kernel,
        snapshots.clone(),
        svids.clone(),
        verifier.clone(),
        settings(daemon),
        proxy::live::Limits::within(daemon.files, memory),
    );

    let waiting = Arc::new(Waiting::default());
    let authorities = Arc::new(Authorities::new(
        membership.clone(),
        links.clone(),
        mailbox.clone(),
        catalog.clone(),
        heard.clone(),
        (clock.clone(), &daemon.store, config.svid_lifetime),
    ));
    let counters = Arc::new(front::Counters::default());
    let member = Arc::new(Member {
        membership: membership.clone(),
        book: book.clone(),
        rules: rules.clone(),
        proxy: proxy.clone(),
        svids: svids.clone(),
        links: links.clone(),
        authorities: authorities.clone(),
        door: counters.clone(),
        clock: clock.clone(),
        port: config.port,
        catalog: catalog.clone(),
        addresses: daemon.lan.addresses(),
        heard: heard.clone(),
        moving: merge::Trouble::default(),
        waiting: waiting.clone(),
    });

    // Doors.
    let configs = Configs {
        data: DataTls {
            svids: svids.clone(),
            listeners: {
                let s = snapshots.clone();
                Arc::new(move |at| proxy::Directory::listener(&*s, at))
            },
        },
        node: node_tls,
    };
    let arrivals = Arc::new(Arrivals {
        api: Arc::new(Api {
            membership: membership.clone(),
            links: links.clone(),
            gossip: mailbox.clone(),
            port: config.port,
            svid_lifetime: config.svid_lifetime,
            authority: config.authority,
            callers: Callers::default(),
            waiting: waiting.clone(),
        }),
        proxy: proxy.clone(),
        membership: membership.clone(),
        mailbox: mailbox.clone(),
        joining: join::pending(),
        waiting,
    });
    let mesh_door = front::Door::new();
    for ip in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let Some(listener) = door(daemon, SocketAddr::new(ip, config.port), "mesh")? else { continue };
        let arrivals = arrivals.clone();
        tasks.spawn(front::accept(listener, configs.clone(), mesh_door.clone(), counters.clone(), move |arrived, from| {
            arrivals.clone().take(arrived, from)
        }));
    }
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        let Some(listener) = door(daemon, SocketAddr::new(ip, config.capture_port), "capture")? else { continue };
        tasks.spawn(proxy::outbound::accept(proxy.clone(), listener));
    }
    tasks.spawn(proxy.clone().look_after());

    // Gossip and addresses.
    let seed = u64::from_be_bytes(meshd_ca::keys::random()?);
    let engine = Gossip::new(
        GossipConfig { sequences: memory::sequences(&daemon.store), ..GossipConfig::default() },
        membership.me(),
        membership.roster(),
        seed,
    );
    let (outrun, outrun_watch) = watch::channel(0);
    let told = {
        let (heard, book) = (heard.clone(), book.clone());
        Box::new(move |node, up| {
            heard.note(node, up);
            book.tell(News::Heard(node, up));
        })
    };
    let gossip = gossip::Task {
        engine,
        membership: membership.clone(),
        links: links.clone(),
        catalog: catalog_writer,
        heard: told,
        outrun,
    };
    tasks.spawn(gossip.run(gossip_inbox));
    tasks.spawn(book_side.run(addresses::Task {
        me: membership.me(),
        config: daemon.config.subscribe(),
        links: links.clone(),
        rules: rules.clone(),
        catalog: catalog.clone(),
        roster: membership.watch(),
        own: daemon.lan.addresses(),
        heard: heard.clone(),
        store: daemon.store.clone(),
    }));
    tasks.spawn(knock::knock(daemon.clone(), member.clone(), first));
    let (presence, presence_watch) = watch::channel(Presence::Running);
    let (told, mut told_watch) = watch::channel(None);
    let keeper = Keeper {
        key: daemon.key.clone(),
        owners,
        diag: SockDiag::open()?,
        config: daemon.config.subscribe(),
        addresses: daemon.lan.addresses(),
        presence: presence_watch,
        told,
        outrun: outrun_watch,
        mailbox: mailbox.clone(),
        svids: svids.clone(),
        looked,
        sequence: Sequence::load(daemon.store.clone())?,
        port: config.port,
        zone: config.zone.clone(),
        signs: membership.signs(),
    };
    tasks.spawn(keeper.run());
    tasks.spawn(authorities.run());
    tasks.spawn(enrolment::tend(member.clone()));
    tasks.spawn(merge::tell_late(daemon.clone(), member.clone()));
    tasks.spawn(Timekeeper { membership: membership.clone(), links: links.clone(), clock: clock.clone() }.run());

    let (close, closing) = watch::channel(false);
    let memory = task::spawn(memory::remember(
        daemon.store.clone(),
        config.state_dir.clone(),
        membership.clone(),
        mailbox.clone(),
        catalog.clone(),
        closing,
    ));

    daemon.lan.announce(Some(membership.roster().mesh()));
    daemon.enter(Phase::Member(member.clone()));
    acquire::spend(config, &membership);
    tracing::info!(mesh = %membership.roster().mesh(), name = %membership.name(), node = %membership.me(), mode = %config.mode, "member");

    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asking = std::pin::pin!(acquire::ask(daemon, Some(&member), None));
    let mut following = std::pin::pin!(merge::follow(daemon, &member));
    let mut upgrading: Option<successor::Upgrading> = None;
    daemon.before.cut(&membership.roster());
    let mut succession: Option<Instant> = None;
    // Also after a start in the middle of that.
    let mut orphaned = (!membership.roster().is_active(membership.me())).then(Instant::now);
    let mut end = loop {
        tokio::select! {
            halt = stop.asked() => break End::Stop(halt),
            Some(node) = sessions.recv() => mailbox.session(node),
            changed = roster.changed() => {
                changed.context("the roster is gone")?;
                let now = roster.borrow_and_update().clone();
                trust.store(Arc::new(Trust { bundle: now.bundle(), roster: now.clone() }));
                svids.trust_changed();
                cut_inactive(&now, &proxy, &links);
                daemon.before.cut(&now);
                match now.member(membership.me()).map(|m| m.standing) {
                    Some(Standing::Active) => orphaned = None,
                    Some(Standing::Left) => break End::Left,
                    Some(Standing::Banished) => break End::Banished,
                    // By itself: the next process goes on with it. Whoever asked for the key starts that, unless this one was started in between.
                    Some(Standing::Replaced) if membership.has_next(now.current(membership.me())) => {
                        _ = succession.get_or_insert_with(|| Instant::now() + TAKES_OVER);
                    }
                    Some(Standing::Replaced) => break End::Replaced,
                    // The authority that let this host in was put out, and who stands in for it was not heard yet.
                    None => _ = orphaned.get_or_insert_with(Instant::now),
                }
            }
            request = inbox.recv() => match request {
                Some(Request::Join(token, reply)) => match acquire::already(Some(&membership), &token) {
                    Ok(Some(joined)) => { let _ = reply.send(Ok(joined)); }
                    Ok(None) => match daemon.pulse.during(acquire::redeem(&daemon.config(), &daemon.lan, &daemon.key, &super::wish(&daemon.config(), &daemon.store), &token)).await {
                        Ok(joined) => {
                            let (place, answer) = acquire::adopt(daemon, joined)?;
                            let _ = reply.send(Ok(answer));
                            break End::Joined(Box::new(place));
                        }
                        Err(failure) => { let _ = reply.send(Err(acquire::no(&failure))); }
                    },
                    Err(error) => { let _ = reply.send(Err(No::new(StatusCode::CONFLICT, "cannot join", error, ""))); }
                },
                Some(Request::Leave(reply)) => match daemon.pulse.during(leave(&member)).await {
                    Ok(()) => { let _ = reply.send(Ok(Done {})); break End::Left; }
                    Err(no) => { let _ = reply.send(Err(no)); }
                },
                Some(Request::Upgrade(reply)) => match &upgrading {
                    Some(_) => { let _ = reply.send(Err(successor::no("an upgrade is under way already"))); }
                    None if daemon.before.is_full() => {
                        let why = format!("{} older processes still have connections: `meshd status`", before::MAX_OLDER);
                        let _ = reply.send(Err(successor::no(why)));
                    }
                    None => upgrading = Some((Box::pin(Successor::start(daemon.program.clone())), reply)),
                },
                None => break End::Stop(Halt::Stop),
            },
            (started, reply) = successor::started(&mut upgrading) => match successor::with_doors(daemon, started) {
                Ok((successor, descriptors)) => {
                    break End::Upgrade(Box::new(Handover { successor, reply, descriptors, kept: None }));
                }
                Err(error) => {
                    let why = format!("{error:#}");
                    tracing::error!(why, "not upgraded: going on as before");
                    let _ = reply.send(Err(successor::no(why)));
                }
            },
            joined = &mut asking => {
                tracing::info!(
                    mesh = %joined.0.roster.mesh(), founder = %joined.0.roster.founder(),
                    "let in by another mesh, approved or as one of its fleet: this one is given up"
                );
                let (place, _) = acquire::adopt(daemon, joined)?;
                break End::Joined(Box::new(place));
            }
            joined = &mut following => {
                membership.give_up(true).await;
                match acquire::adopt(daemon, joined) {
                    Ok((place, answer)) => {
                        tracing::info!(mesh = %answer.mesh, name = %answer.name, "let in where this mesh moves: this one is given up");
                        break End::Moved(Box::new(place));
                    }
                    // Still a member here, and still invited there.
                    Err(error) => {
                        tracing::error!(error = format!("{error:#}"), "the place in the mesh where this one moves could not be saved; trying again");
                        membership.give_up(false).await;
                        following.set(merge::follow(daemon, &member));
                    }
                }
            }
            _ = tick.tick() => {
                if succession.is_some_and(|at| at <= Instant::now()) && upgrading.is_none() && !daemon.before.is_full() {
                    succession = Some(Instant::now() + TAKES_OVER);
                    let (reply, _) = tokio::sync::oneshot::channel();
                    upgrading = Some((Box::pin(Successor::start(daemon.program.clone())), reply));
                }
                member.look_after();
                daemon.pulse.beat();
                if orphaned.is_some_and(|since| since.elapsed() >= ORPHANED) {
                    tracing::error!("who let this host in was put out of the mesh, and no authority stands in: it has to join again");
                    break End::Left;
                }
            }
            Some(ended) = tasks.join_next() => if let Err(error) = ended && error.is_panic() {
                // A part of the daemon that is gone leaves a member that lies about itself: better to be started again.
                anyhow::bail!("a part of meshd failed: {error}");
            },
        }
    };

    if let End::Upgrade(handover) = &mut end {
        // What takes time first, while everything is still served.
        daemon
            .pulse
            .during(async {
                close.send_replace(true);
                if tokio::time::timeout(FAREWELL, memory).await.is_err() {
                    tracing::warn!("what is known of the others was not written in time");
                }
                write_svids(daemon, &svids).await;
            })
            .await;
        proxy.retire();
        tasks.shutdown().await;
        links.linked().into_iter().for_each(|node| links.close(node));
        handover.descriptors.extend(rules.surrender().map(|(name, socket)| (name.to_owned(), socket)));
        let mut bound = snapshots.carried();
        bound.extend(book.latest().captured.iter().map(|(ip, b)| (*ip, (b.node, b.port))));
        match before::bound(&bound) {
            Ok(bound) => handover.descriptors.push(bound),
            Err(error) => tracing::warn!(%error, "the proven addresses cannot be handed over"),
        }
        let arriving = Arc::downgrade(&arrivals);
        handover.kept = Some(before::Kept { proxy: proxy.clone(), quiet: Box::new(move || arriving.strong_count() == 0) });
        return Ok(end);
    }

    if let End::Moved(_) = &end {
        let strict = daemon.config().mode == Mode::Strict;
        let moving = async {
            daemon.lan.announce(None);
            presence.send_replace(Presence::Stopped);
            let farewell = async {
                let _ = told_watch.wait_for(|t| *t == Some(Presence::Stopped)).await;
                mailbox.leave().await;
            };
            let _ = tokio::time::timeout(FAREWELL, farewell).await;
            // Those who have not moved yet are ordinary hosts for a moment; strict ones stay strict.
            if !strict {
                rules.release();
            }
            close.send_replace(true);
            if tokio::time::timeout(FAREWELL, memory).await.is_err() {
                tracing::warn!("what is known of the others was not written in time");
            }
            tokio::time::sleep(LINGER).await;
        };
        daemon.pulse.during(moving).await;
        proxy.retire();
        // Whoever knocks meanwhile is answered in the next life.
        match daemon.doors.duplicate() {
            Ok(doors) => daemon.doors.inherit(doors),
            Err(error) => tracing::warn!(%error, "the mesh port is closed for a moment"),
        }
        tasks.shutdown().await;
        links.linked().into_iter().for_each(|node| links.close(node));
        // Nothing is captured in the next life without a proof: neither what was proven in the last moment, nor one that has moved before this host and
        // is a member there already.
        if !strict {
            rules.release();
            if let Err(error) = addresses::forget(&daemon.store) {
                tracing::warn!(%error, "the proven addresses of the mesh before could not be removed");
            }
        }
        let rules = rules.surrender().map(|(name, socket)| (name.to_owned(), socket));
        daemon.doors.inherit(daemon.before.take(rules.into_iter().collect(), &daemon.manager));
        let arriving = Arc::downgrade(&arrivals);
        daemon.before.keep(before::Kept { proxy: proxy.clone(), quiet: Box::new(move || arriving.strong_count() == 0) });
        return Ok(end);
    }

    // Others first, so that they stop sending here; then our own applications; then what is still open.
    let restart = matches!(end, End::Stop(Halt::Restart));
    tracing::info!(restart, "stopping: telling the others, then letting connections end");
    if matches!(end, End::Stop(_)) {
        daemon.manager.stopping(config.drain + 4 * FAREWELL);
    }
    let last = if restart { Presence::Restarting } else { Presence::Stopped };
    let ending = async {
        if !restart {
            daemon.lan.announce(None);
        }
        presence.send_replace(last);
        let farewell = async {
            let _ = told_watch.wait_for(|t| *t == Some(last)).await;
            if !restart {
                mailbox.leave().await;
            }
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
        if !restart && daemon.config().mode != Mode::Strict {
            rules.release();
        }
        let (cut, ()) = tokio::join!(proxy.drain(config.drain), daemon.before.stop(config.drain));
        if cut > 0 {
            tracing::warn!(cut, "connections did not end in time and were reset");
        }
        close.send_replace(true);
        if tokio::time::timeout(FAREWELL, memory).await.is_err() {
            tracing::warn!("what is known of the others was not written in time");
        }
        write_svids(daemon, &svids).await;
    };
    daemon.pulse.during(ending).await;
    // Last: while a connection lives, its service answers a borrowed address that only the rules keep on this host. They stay for the
    // next process, if somebody keeps the socket they belong to.
    if !restart {
        rules.remove();
    }
    tasks.shutdown().await;
    Ok(end)
}

/// What to do with what arrives on the mesh port.
struct Arrivals {
    api: Arc<Api>,
    proxy: Arc<Proxy>,
    membership: Arc<Membership>,
    mailbox: Mailbox,
    joining: Crowd<IpAddr>,
    waiting: Arc<Waiting>,
}

impl Arrivals {
    async fn take(self: Arc<Self>, arrived: Arrived, from: SocketAddr) {
        // Each in a place of its own: a connection must not be as large as the largest thing it might have been.
        match arrived {
            Arrived::Data(tunnel) => Box::pin(proxy::inbound::serve(&self.proxy, tunnel, from)).await,
            // The next process answers.
            Arrived::Control(stream) => tokio::select! {
                () = Box::pin(serve::serve(*stream, from, self.api.clone())) => {}
                () = self.proxy.live.retired() => {}
            },
            Arrived::Join(stream) => {
                let joined = join::serve(*stream, from, self.membership.clone(), self.joining.clone(), &self.waiting);
                let admitted = Box::pin(joined).await;
                if let Some(entry) = admitted.and_then(|node| self.membership.roster().entry(node).cloned()) {
                    self.mailbox.entry(entry);
                }
            }
        }
    }
}

/// A listening socket of ours; none where the address family does not exist on this host.
fn door(daemon: &Daemon, address: SocketAddr, what: &str) -> anyhow::Result<Option<Arc<TcpListener>>> {
    match daemon.doors.open(address, Mark::Mesh) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if address.is_ipv6() && error.kind() != std::io::ErrorKind::AddrInUse => {
            tracing::info!(%error, %address, "no IPv6 here");
            Ok(None)
        }
        Err(error) => Err(error)
            .with_context(|| format!("cannot listen on the {what} port {address}; is another program or meshd using it?")),
    }
}

/// Addresses of a node, best first: proven ones, then those it publishes.
fn whereabouts(book: &Book, catalog: &watch::Receiver<Arc<Catalog>>, node: NodeId) -> Vec<SocketAddr> {
    let proven = book.latest();
    let proven = proven.captured.iter().filter(|(_, b)| b.node == node).map(|(ip, b)| SocketAddr::new(*ip, b.port));
    let mut all: Vec<SocketAddr> = proven.collect();
    if let Some(record) = catalog.borrow().record(node) {
        all.extend(record.addresses.iter().map(|a| SocketAddr::new(a.ip, record.port)));
    }
    let mut seen = BTreeSet::new();
    all.retain(|a| seen.insert(*a));
    all.truncate(8);
    all
}

fn cut_inactive(roster: &Roster, proxy: &Proxy, links: &Links) {
    before::cut(proxy, before::inactive(roster).inspect(|(node, _)| links.close(*node)));
}

async fn leave(member: &Member) -> Result<(), No> {
    let (membership, links) = (&member.membership, &member.links);
    let no = |why: String, remedy: &str| No::new(StatusCode::CONFLICT, "cannot leave", why, remedy);
    let roster = membership.roster();
    let others = roster.active().filter(|m| m.node() != membership.me()).count();
    // One that still prepares is of no help to them.
    let other_authorities = member.authorities.moment().view().signing().into_iter().filter(|n| *n != membership.me()).count();
    if others > 0 && other_authorities == 0 && membership.is_authority().await {
        return Err(no(
            format!(
                "this host is the only authority of a mesh with {others} other members, whose certificates nobody could renew"
            ),
            "`meshd authority add` another one, or let the others leave first",
        ));
    }
    let entry = membership.leave().await.map_err(|e| no(e.to_string(), ""))?;
    // Directly to everybody in reach: gossip does not take the word of a node that is no member.
    let mut told = Tasks::new();
    for other in roster.active().map(meshd_ca::roster::Member::node).filter(|n| *n != membership.me()) {
        let (links, entry) = (links.clone(), entry.clone());
        told.spawn(async move { links.farewell(other, entry).await });
    }
    let _ = tokio::time::timeout(FAREWELL, async { while told.join_next().await.is_some() {} }).await;
    Ok(())
}

fn settings(daemon: &Daemon) -> proxy::Settings {
    let config = daemon.config();
    proxy::Settings {
        ports: proxy::OwnPorts {
            mesh: config.port,
            capture: config.capture_port,
            admin: config.admin_address.is_none().then_some(config.admin_port),
        },
        keepalive: config.keepalive,
        access: daemon.access().clone(),
        ..proxy::Settings::default()
    }
}

/// Saves the SVIDs a moment after they changed, so that a burst is one write.
async fn save_svids(daemon: Arc<Daemon>, svids: Arc<Svids>, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        tokio::time::sleep(SETTLE).await;
        changes.borrow_and_update();
        // A full disk is emptied some day, and by then nothing may change for a day: do not wait for that.
        while !write_svids(&daemon, &svids).await {
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Whether they are on disk.
async fn write_svids(daemon: &Daemon, svids: &Svids) -> bool {
    let (store, bytes) = (daemon.store.clone(), svids.export());
    match task::blocking(move || store.save(SVIDS, &bytes)).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => tracing::warn!(%error, "the SVIDs could not be saved; a restart now would ask for new ones"),
        Err(error) => tracing::warn!(%error, "the SVIDs could not be saved"),
    }
    false
}
