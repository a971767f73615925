//! The same without a kernel, sockets or a clock: thousands of schedules a second, each the same whenever its seed is. How much a call
//! reads or writes, when it is told to wait although it need not, and what is done to the bytes on the wire, all that the seed decides.
//!
//! `MESHD_SCHEDULES=1000000` runs a million, in ten minutes or so.

mod pooled;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Dice, Ear, End, Kind, PAIRS, Script, Seen, Wire, header, judge, seeds};
use crate::identity::traffic::{HEADER, MAX_RECORD, Made};
use crate::proxy::Fault;
use crate::proxy::tests::lab::{Lab, lab};
use crate::proxy::tests::pattern;
use crate::proxy::tunnel::{Role, Stream, Tunnel, Version, dry};

/// Rounds in which nothing happens, after which nothing ever will.
const STILL: u32 = 2_000;

/// How many of sixteen buffers are not to be had: most schedules have all they want, some now and then one, some none.
const DRY: [u8; 5] = [0, 0, 2, 8, 16];

/// One direction of a connection.
#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    room: usize,
    ended: bool,
    /// Nobody reads any more.
    closed: bool,
    harm: Option<Harm>,
    /// Bytes that were written, and what of them waits until its record is whole.
    passed: usize,
    part: Vec<u8>,
    records: usize,
    /// Whether anything was changed.
    harmed: bool,
}

/// What somebody on the wire does to one direction: at a byte, or at a record.
#[derive(Debug, Clone, Copy)]
enum Harm {
    Flip(usize, u8),
    Drop(usize, usize),
    Insert(usize, usize),
    Cut(usize),
    Omit(usize),
    Repeat(usize),
    /// This and the one behind it change places.
    Swap(usize),
}

impl Queue {
    fn push(&mut self, piece: &[u8]) {
        match self.harm {
            None => self.bytes.extend(piece),
            Some(Harm::Omit(_) | Harm::Repeat(_) | Harm::Swap(_)) => {
                self.part.extend(piece);
                self.whole_records();
            }
            Some(harm) => {
                for byte in piece {
                    let at = self.passed;
                    self.passed += 1;
                    match harm {
                        Harm::Flip(here, bit) if at == here => {
                            self.harmed = true;
                            self.bytes.push_back(byte ^ 1 << bit);
                        }
                        Harm::Drop(here, many) if (here..here + many).contains(&at) => self.harmed = true,
                        Harm::Insert(here, many) if at == here => {
                            self.harmed = true;
                            self.bytes.extend(std::iter::repeat_n(23, many));
                            self.bytes.push_back(*byte);
                        }
                        Harm::Cut(here) if at >= here => {
                            self.harmed = true;
                            self.ended = true;
                        }
                        _ => self.bytes.push_back(*byte),
                    }
                }
            }
        }
    }

    fn whole_records(&mut self) {
        while let Some(length) = record(&self.part) {
            let number = self.records;
            match self.harm {
                Some(Harm::Omit(which)) if which == number => self.harmed = true,
                Some(Harm::Repeat(which)) if which == number => {
                    self.harmed = true;
                    self.bytes.extend(self.part[..length].iter().chain(&self.part[..length]));
                }
                Some(Harm::Swap(which)) if which == number => {
                    // Not before the next is whole.
                    let Some(second) = record(&self.part[length..]) else { return };
                    self.harmed = true;
                    self.bytes.extend(&self.part[length..length + second]);
                    self.bytes.extend(&self.part[..length]);
                    self.part.drain(..second);
                    self.records += 1;
                }
                _ => self.bytes.extend(&self.part[..length]),
            }
            self.part.drain(..length);
            self.records += 1;
        }
    }
}

/// How long the whole record is that these bytes begin with.
fn record(bytes: &[u8]) -> Option<usize> {
    let length = HEADER + usize::from(u16::from_be_bytes([*bytes.get(3)?, *bytes.get(4)?]));
    (bytes.len() >= length).then_some(length)
}

/// What both ends of a connection share.
struct Link {
    queues: [Queue; 2],
    /// It was reset, and an end was not told of that yet.
    dead: bool,
    error: [bool; 2],
    dice: Dice,
    /// So many bytes were looked at and are too few: an end is woken by what comes behind them.
    seen: [usize; 2],
    /// A call moves so many bytes at most.
    most: usize,
    /// One in so many calls is told to wait.
    lazy: usize,
}

/// One end of a connection. As a socket of TCP: dropped, it resets what it has not read; dropped before its end, always if it is an
/// application's.
struct Sim {
    link: Arc<Mutex<Link>>,
    me: usize,
    resets: AtomicBool,
    /// Counts what happened in the whole schedule.
    steps: Arc<AtomicU64>,
}

/// A kernel has room for a record: where there is not always a buffer it has to, or it is waited for by the clock.
fn roomy(seed: u64, link: &Mutex<Link>) {
    if DRY[seed as usize / 2 % DRY.len()] > 0 {
        link.lock().unwrap().queues.iter_mut().for_each(|queue| queue.room += MAX_RECORD);
    }
}

/// For so many bytes: what is long is not cut into more than some hundred pieces.
fn connected(dice: &mut Dice, bytes: usize, steps: &Arc<AtomicU64>) -> (Sim, Sim) {
    let least = bytes / 200;
    let most = [1 + dice.roll(20), 1 + dice.roll(2_000), 1 << 20, 1 << 20][dice.roll(4)] + least;
    let room = [1 + dice.roll(100), 1 + dice.roll(20_000), 1 << 18, 1 << 18][dice.roll(4)] + least;
    let queue = || Queue { room, ..Queue::default() };
    let lazy = [2, 10, 1000][dice.roll(3)];
    let link = Link {
        queues: [queue(), queue()],
        dead: false,
        error: [false; 2],
        seen: [0; 2],
        dice: Dice::new(dice.roll(1 << 30) as u64),
        most,
        lazy,
    };
    let link = Arc::new(Mutex::new(link));
    let end = |me| Sim { link: link.clone(), me, resets: AtomicBool::new(false), steps: steps.clone() };
    (end(0), end(1))
}

impl Link {
    fn waits(&mut self) -> bool {
        let lazy = self.lazy;
        self.dice.roll(lazy) == 0
    }

    /// Ends both directions, as somebody in the middle does who goes away.
    fn end(&mut self) {
        self.queues.iter_mut().for_each(|queue| queue.ended = true);
    }

    fn reset(&mut self, by: usize) {
        (self.dead, self.error[1 - by]) = (true, true);
        for queue in &mut self.queues {
            (queue.ended, queue.closed) = (true, true);
        }
        // What is under way may be lost, or not.
        if self.dice.roll(2) == 0 {
            self.queues[by].bytes.clear();
        }
    }
}

fn wait<T>() -> io::Result<T> {
    Err(io::ErrorKind::WouldBlock.into())
}

impl Sim {
    fn with<T>(&self, work: impl FnOnce(&mut Link) -> T) -> T {
        work(&mut self.link.lock().unwrap())
    }

    fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends as a socket does whose application went away in the middle.
    fn reset(self) {
        self.resets.store(true, Ordering::Relaxed);
    }

    fn is_readable(&self, link: &mut Link) -> bool {
        let queue = &link.queues[1 - self.me];
        queue.bytes.len() > link.seen[self.me] || queue.ended || link.error[self.me]
    }

    /// What there is to read; none at the end.
    fn readable<'a>(&self, link: &'a mut Link) -> io::Result<&'a mut Queue> {
        link.seen[self.me] = 0;
        if link.queues[1 - self.me].bytes.is_empty() {
            if std::mem::take(&mut link.error[self.me]) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if !link.queues[1 - self.me].ended {
                return wait();
            }
        }
        Ok(&mut link.queues[1 - self.me])
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        let resets = self.resets.load(Ordering::Relaxed);
        self.with(|link| match resets || !link.queues[1 - self.me].bytes.is_empty() {
            true if link.queues[self.me].closed => {}
            true => link.reset(self.me),
            false => {
                link.queues[self.me].ended = true;
                link.queues[1 - self.me].closed = true;
            }
        });
        self.step();
    }
}

impl Wire for Sim {
    fn ended(&self) -> io::Result<()> {
        self.resets.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl Stream for Sim {
    fn poll_readable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Now and then it is told so although there is nothing.
        self.with(
            |link| if self.is_readable(link) ^ (link.waits() && link.waits()) { Poll::Ready(Ok(())) } else { Poll::Pending },
        )
    }

    fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|link| {
            let queue = &link.queues[self.me];
            let room = queue.closed || queue.bytes.len() < queue.room || link.error[self.me];
            if room ^ (link.waits() && link.waits()) { Poll::Ready(Ok(())) } else { Poll::Pending }
        })
    }

    fn try_read_vectored(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.with(|link| {
            if link.waits() {
                return wait();
            }
            let mut left = 1 + link.dice.roll(link.most);
            let queue = self.readable(link)?;
            let mut done = 0;
            for piece in into {
                let fits = piece.len().min(left).min(queue.bytes.len());
                for (to, from) in piece.iter_mut().zip(queue.bytes.drain(..fits)) {
                    *to = from;
                }
                (done, left) = (done + fits, left - fits);
            }
            self.step();
            Ok(done)
        })
    }

    fn try_write_vectored(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.with(|link| {
            if std::mem::take(&mut link.error[self.me]) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if link.queues[self.me].closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if link.waits() {
                return wait();
            }
            let most = 1 + link.dice.roll(link.most);
            let queue = &mut link.queues[self.me];
            let mut left = most.min(queue.room.saturating_sub(queue.bytes.len()));
            if left == 0 {
                return wait();
            }
            let mut done = 0;
            for piece in from {
                let fits = piece.len().min(left);
                queue.push(&piece[..fits]);
                (done, left) = (done + fits, left - fits);
            }
            self.step();
            Ok(done)
        })
    }

    fn peek(&self) -> io::Result<usize> {
        self.with(|link| self.readable(link).map(|queue| usize::from(!queue.bytes.is_empty())))
    }

    fn try_peek(&self) -> io::Result<usize> {
        self.peek()
    }

    fn try_look(&self, into: &mut [u8], least: usize) -> io::Result<usize> {
        self.with(|link| {
            // Who was told that nothing more will come finds what there is.
            if link.waits() && !link.queues[1 - self.me].ended {
                return wait();
            }
            let queue = self.readable(link)?;
            let there = queue.bytes.len().min(into.len());
            into.iter_mut().zip(&queue.bytes).for_each(|(to, from)| *to = *from);
            if 0 < there && there < least {
                link.seen[self.me] = there;
                return wait();
            }
            Ok(there)
        })
    }

    fn take(&self, into: &mut [u8]) -> io::Result<()> {
        self.with(|link| {
            let queue = &mut link.queues[1 - self.me].bytes;
            if queue.len() < into.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let count = into.len();
            into.iter_mut().zip(queue.drain(..count)).for_each(|(to, from)| *to = from);
            self.step();
            Ok(())
        })
    }

    async fn more(&self) -> io::Result<bool> {
        poll_fn(|context| self.poll_readable(context)).await?;
        Ok(self.with(|link| link.queues[1 - self.me].ended))
    }

    fn end(&self) -> io::Result<()> {
        self.step();
        self.with(|link| {
            link.queues[self.me].ended = true;
            if link.dead { Err(io::ErrorKind::NotConnected.into()) } else { Ok(()) }
        })
    }

    async fn broken_off(&self) -> io::Error {
        poll_fn(|_| match self.with(|link| std::mem::take(&mut link.error[self.me])) {
            true => Poll::Ready(io::ErrorKind::ConnectionReset.into()),
            false => Poll::Pending,
        })
        .await
    }
}

impl AsyncRead for Sim {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.try_read(into.initialize_unfilled()) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            done => Poll::Ready(done.map(|n| into.advance(n))),
        }
    }
}

impl AsyncWrite for Sim {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        match self.try_write_vectored(&[IoSlice::new(from)]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            done => Poll::Ready(done),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.end())
    }
}

/// Lets the others go first so many times.
async fn pause(mut rounds: usize) {
    poll_fn(|_| {
        rounds = rounds.saturating_sub(1);
        if rounds == 0 { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

impl Dice {
    fn below(&mut self, limits: &[usize]) -> usize {
        let limit = limits[self.roll(limits.len())];
        self.roll(limit)
    }
}

impl Script {
    /// Mostly short, for it is the ends of streams that are hard; now and then as long as they come.
    fn short(dice: &mut Dice) -> Self {
        let total = match dice.roll(4_000) {
            0 => dice.roll(10 << 20),
            1..=40 => dice.roll(200_000),
            41..=400 => 16_384 - 32 + dice.roll(64),
            401..=1200 => 0,
            1201..=1600 => 1,
            _ => dice.below(&[20, 1_000, 8_000]),
        };
        let (mut pieces, mut left) = (Vec::new(), total);
        while left > 0 && pieces.len() < 30 {
            let piece = (1 + dice.below(&[10, 1_000, 70_000])).min(left);
            pieces.push(piece);
            left -= piece;
        }
        pieces.extend((left > 0).then_some(left));
        let ear = [Ear::Eager, Ear::Eager, Ear::Late, Ear::Slow][dice.roll(4)];
        let resets = (dice.roll(8) == 0).then(|| dice.roll(pieces.len() + 1));
        Self {
            bytes: pattern(total, dice.roll(1 << 30) as u64),
            pieces,
            pauses: dice.roll(4) == 0,
            ear,
            resets,
            ends_last: false,
        }
    }

    /// At most so many bytes.
    fn cut(&mut self, most: usize) {
        if self.bytes.len() > most {
            self.bytes.truncate(most);
            self.pieces = vec![most];
        }
    }

    /// As [`Script::play`], without a clock.
    async fn act(&self, app: Sim) -> (Vec<u8>, bool) {
        if let Some(pieces) = self.resets {
            // The other one may do the same, and then nobody reads.
            let mut say = Box::pin(self.speak(&app, pieces));
            let mut rounds = 0;
            poll_fn(|context| {
                rounds += 1;
                let said = say.as_mut().poll(context).is_ready();
                if said || rounds > 100 { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            drop(say);
            app.reset();
            return (Vec::new(), false);
        }
        let heard_all = AtomicBool::new(false);
        let say = async {
            let said = self.speak(&app, self.pieces.len()).await;
            if self.ends_last {
                poll_fn(|_| if heard_all.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending }).await;
            }
            said && Stream::end(&app).is_ok()
        };
        let hear = async {
            let all = self.listen(&app).await;
            heard_all.store(true, Ordering::Relaxed);
            all
        };
        let (said, (heard, clean)) = tokio::join!(say, hear);
        (heard, said && clean)
    }

    async fn speak(&self, to: &Sim, pieces: usize) -> bool {
        let mut at = 0;
        for piece in &self.pieces[..pieces] {
            let end = at + piece;
            while at < end {
                match to.try_write_vectored(&[IoSlice::new(&self.bytes[at..end])]) {
                    Ok(n) => at += n,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => pause(2).await,
                    Err(_) => return false,
                }
            }
            if self.pauses {
                pause(1 + at % 29).await;
            }
        }
        true
    }

    async fn listen(&self, from: &Sim) -> (Vec<u8>, bool) {
        let (mut heard, mut some) =
            (Vec::new(), vec![0; if self.ear == Ear::Slow { 700 + self.bytes.len() / 50 } else { 1 << 14 }]);
        if self.ear == Ear::Late {
            pause(60).await;
        }
        loop {
            match from.try_read(&mut some) {
                Ok(0) => return (heard, true),
                Ok(n) => heard.extend_from_slice(&some[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => pause(2).await,
                Err(_) => return (heard, false),
            }
            if self.ear == Ear::Slow {
                pause(9).await;
            }
        }
    }
}

/// Runs it to its end. When nothing happens any more `still` may do something about it, once.
fn run<T>(what: &dyn Fn() -> String, steps: &AtomicU64, work: impl Future<Output = T>, still: impl FnOnce()) -> T {
    let mut work = pin!(work);
    let mut context = Context::from_waker(Waker::noop());
    let (mut rounds, mut before, mut still) = (0, 0, Some(still));
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut context) {
            return done;
        }
        let now = steps.load(Ordering::Relaxed);
        rounds = if now == before { rounds + 1 } else { 0 };
        before = now;
        if rounds > STILL {
            rounds = 0;
            still.take().unwrap_or_else(|| panic!("{} hangs", what()))();
        }
    }
}

async fn carry(end: io::Result<End<Sim>>, app: Sim, role: Role) -> Result<End<Sim>, Fault> {
    let mut end = end.map_err(Fault::Handshake)?;
    end.carry(app, role).await.map(|()| end)
}

/// One stream between two ends.
async fn stream(
    dice: &mut Dice,
    steps: &Arc<AtomicU64>,
    (client, service): (&Script, &Script),
    dialler: impl Future<Output = io::Result<End<Sim>>>,
    dialled: impl Future<Output = io::Result<End<Sim>>>,
) -> Seen<Sim> {
    let bytes = client.bytes.len() + service.bytes.len();
    let ((app, captured), (served, delivered)) = (connected(dice, bytes, steps), connected(dice, bytes, steps));
    // The proxy's ends reset unless all went well.
    for end in [&captured, &delivered] {
        end.resets.store(true, Ordering::Relaxed);
    }
    let (client, service, dialler, dialled) = tokio::join!(
        client.act(app),
        service.act(served),
        async { carry(dialler.await, captured, Role::Dialler(header())).await },
        async { carry(dialled.await, delivered, Role::Dialled).await },
    );
    Seen { client, service, dialler, dialled }
}

fn made(dice: &mut Dice) -> Made {
    let key = |dice: &mut Dice| std::array::from_fn(|_| dice.roll(256) as u8);
    Made { sending: key(dice), receiving: key(dice), aes: dice.roll(2) == 0 }
}

fn version(pair: (Kind, Kind)) -> Version {
    if pair == (Kind::Two, Kind::Two) { Version::Two } else { Version::One }
}

/// Streams over one tunnel, one after another for as long as it lasts. Returns how many there were.
fn schedule(lab: &Lab, seed: u64) -> u64 {
    dry(DRY[seed as usize / 2 % DRY.len()], seed);
    let mut dice = Dice::new(seed);
    let steps = Arc::new(AtomicU64::new(0));
    // rustls as it is shakes hands, which takes longer than everything else.
    let pair = match dice.roll(40) {
        0 => PAIRS[dice.roll(PAIRS.len())],
        1..=8 => (Kind::One, Kind::One),
        _ => (Kind::Two, Kind::Two),
    };
    let shakes = pair.0 == Kind::Reference || pair.1 == Kind::Reference || pair.0 != pair.1;
    let renewals = [(); 2].map(|()| (dice.roll(2) == 0).then(|| 1 + dice.roll(20) as u64));
    let streams = 1 + dice.roll(4) as u64;
    let scripts = |dice: &mut Dice| {
        let (mut client, mut service) = (Script::short(dice), Script::short(dice));
        let last = dice.roll(4);
        (client.ends_last, service.ends_last) = (last == 0, last == 1);
        (client, service)
    };
    let (client, service) = scripts(&mut dice);
    let (a, b) = connected(&mut dice, client.bytes.len() + service.bytes.len(), &steps);
    roomy(seed, &a.link);
    if shakes {
        // rustls as it is reads nothing while a word of its own waits: there has to be room for one.
        a.with(|link| link.queues.iter_mut().for_each(|queue| queue.room += 20_000));
    }
    let keys = made(&mut dice);
    let dialler = async {
        let mut end = if shakes { pair.0.dial(lab, a).await? } else { End::Ours(Tunnel::made(a, version(pair), keys)) };
        renewals[0].inspect(|after| end.renew(*after));
        Ok(end)
    };
    let dialled = async {
        let mut end = if shakes { pair.1.answer(lab, b).await? } else { End::Ours(Tunnel::made(b, version(pair), keys.other())) };
        renewals[1].inspect(|after| end.renew(*after));
        Ok(end)
    };
    let what = |number| format!("seed {seed}, {pair:?}, stream {number}");
    let first = stream(&mut dice, &steps, (&client, &service), dialler, dialled);
    let hangs = || format!("{}: {client:?}; {service:?}", what(0));
    let mut seen = run(&hangs, &steps, first, || panic!("{} hangs", hangs()));
    judge(&what(0), &client, &service, &seen);
    for number in 1..streams {
        let (Ok(dialler), Ok(dialled)) = (seen.dialler, seen.dialled) else { return number };
        if !dialler.lasts() {
            return number;
        }
        let (client, service) = scripts(&mut dice);
        let hangs = || format!("{}: {client:?}; {service:?}", what(number));
        let again = stream(&mut dice, &steps, (&client, &service), async { Ok(dialler) }, async { Ok(dialled) });
        seen = run(&hangs, &steps, again, || panic!("{} hangs", hangs()));
        judge(&what(number), &client, &service, &seen);
    }
    streams
}

/// Something is done to one direction of a tunnel.
fn harmed(seed: u64) -> bool {
    dry(DRY[seed as usize / 2 % DRY.len()], seed);
    let mut dice = Dice::new(seed ^ 0x6861_726d);
    let steps = Arc::new(AtomicU64::new(0));
    let pair = if dice.roll(3) == 0 { (Kind::One, Kind::One) } else { (Kind::Two, Kind::Two) };
    let script = |bytes: Vec<u8>, dice: &mut Dice| {
        let piece = 1 + dice.roll(bytes.len().max(1));
        let pieces = bytes.chunks(piece).map(<[u8]>::len).collect();
        Script { bytes, pieces, pauses: false, ear: Ear::Eager, resets: None, ends_last: false }
    };
    let length = dice.below(&[10, 2_000, 40_000]);
    let (long, short) = (script(pattern(length, seed), &mut dice), script(b"short".to_vec(), &mut dice));
    let (at, number) = (dice.roll(length + 100), dice.roll(3 + length / 10_000));
    let harm = match dice.roll(7) {
        0 => Harm::Flip(at, dice.roll(8) as u8),
        1 => Harm::Drop(at, 1 + dice.roll(200)),
        2 => Harm::Insert(at, 1 + dice.roll(30)),
        3 => Harm::Cut(at),
        4 => Harm::Omit(number),
        5 => Harm::Repeat(number),
        _ => Harm::Swap(number),
    };
    let up = dice.roll(2) == 0;
    let (client, service) = if up { (&long, &short) } else { (&short, &long) };
    let (a, b) = connected(&mut dice, length, &steps);
    let link = a.link.clone();
    roomy(seed, &link);
    link.lock().unwrap().queues[usize::from(!up)].harm = Some(harm);
    let keys = made(&mut dice);
    let (a, b) = (Tunnel::made(a, version(pair), keys), Tunnel::made(b, version(pair), keys.other()));
    let what = || format!("seed {seed}, {pair:?}, {harm:?}, up: {up}, {length} bytes");
    let whole = stream(&mut dice, &steps, (client, service), async { Ok(End::Ours(a)) }, async { Ok(End::Ours(b)) });
    // What is missing might be waited for until somebody gives up.
    let seen = run(&what, &steps, whole, || link.lock().unwrap().end());
    let (heard, end) = if up { (&seen.service, &seen.dialled) } else { (&seen.client, &seen.dialler) };
    assert!(long.bytes.starts_with(&heard.0), "{}: other bytes than were sent", what());
    let (harmed, records) = {
        let queue = &link.lock().unwrap().queues[usize::from(!up)];
        (queue.harmed, queue.records)
    };
    if harmed && (heard.1 || end.is_ok()) {
        // Only what came again behind the end, whole as it was: it is for the next stream to find.
        let behind = matches!(harm, Harm::Repeat(which) if which + 1 == records);
        let whole = heard.1 && end.is_ok() && heard.0 == long.bytes;
        assert!(behind && whole, "{}: {} bytes as if nothing had happened: {seen:?}", what(), heard.0.len());
        if let (Ok(a), Ok(b)) = (seen.dialler, seen.dialled)
            && a.lasts()
        {
            let next = stream(&mut dice, &steps, (&short, &short), async { Ok(a) }, async { Ok(b) });
            let seen = run(&what, &steps, next, || link.lock().unwrap().end());
            let (heard, end) = if up { (&seen.service, &seen.dialled) } else { (&seen.client, &seen.dialler) };
            assert!(!heard.1 && end.is_err(), "{}, next stream: {seen:?}", what());
        }
    }
    harmed
}

/// Runs `one` with every seed, on two threads. Returns the sum of what it returns.
fn every_seed(usual: u64, one: impl Fn(u64) -> u64 + Sync) -> u64 {
    let (one, seeds) = (&one, seeds(usual));
    std::thread::scope(|scope| {
        let half = |odd: u64| {
            scope.spawn({
                let seeds = seeds.clone();
                move || seeds.filter(|s| s % 2 == odd).map(one).sum::<u64>()
            })
        };
        [half(0), half(1)].map(|half| half.join().unwrap()).iter().sum()
    })
}

#[test]
fn a_tunnel_without_a_kernel_does_the_same_under_random_schedules() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let lab = runtime.block_on(lab());
    let handle = runtime.handle();
    let streams = every_seed(2_000, |seed| {
        let _timers = handle.enter();
        schedule(&lab, seed)
    });
    println!("{streams} streams");
    assert!(streams > 0);
}

#[test]
fn what_is_changed_without_a_kernel_is_never_delivered_and_never_a_clean_end() {
    let changed = every_seed(2_000, |seed| u64::from(harmed(seed)));
    println!("{changed} changed");
    assert!(changed > 0);
}
